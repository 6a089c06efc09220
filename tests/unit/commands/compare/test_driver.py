"""Runs side by side: settings that differ, arms, and differences prompt by prompt."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.compare import compare
from alignment.core.errors import ConfigError

METRIC = "brevity"
EACH = 10


class Runs:
    """Folders of runs as the driver leaves them."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def add(
        self,
        name: str,
        scores: dict[str, list[float | None]] | None,
        *,
        prompts: str = "p",
        ids: bool = True,
        higher_is_better: bool = True,
        each: int = EACH,
        **settings: Any,
    ) -> None:
        """A run; with ``scores`` of its arms, it has an evaluation, in which so many prompts have each score."""
        run = self.output / "runs" / name
        run.mkdir(parents=True)
        config = {
            "name": name,
            "seed": 1,
            "launch": {"threads": len(name)},
            "stages": {"dpo": {"beta": 0.1, **settings}},
        }
        stages = {"dpo": {"kind": "dpo", "artifact": str(run / "none")}}
        if scores is not None:
            stages["judge"] = {"kind": "evaluate", "artifact": str(run)}
            self.evaluate(run, scores, prompts=prompts, ids=ids, higher_is_better=higher_is_better, each=each)
        (run / "run.json").write_text(json.dumps({"config": config, "stages": stages}))

    def evaluate_again(
        self, name: str, scores: dict[str, list[float | None]], *, metric: str, shown: str = "judge"
    ) -> None:
        """Adds the evaluation ``ood``, and a report that shows ``shown``."""
        run = self.output / "runs" / name
        record = json.loads((run / "run.json").read_text())
        record["stages"] |= {
            "ood": {"kind": "evaluate", "artifact": str(run / "ood")},
            "report": {"kind": "report", "inputs": {"evaluation": f"stage:{shown}"}},
        }
        (run / "run.json").write_text(json.dumps(record))
        (run / "ood").mkdir()
        self.evaluate(run / "ood", scores, prompts="o", metric=metric)

    def evaluate(
        self,
        folder: Path,
        scores: dict[str, list[float | None]],
        *,
        prompts: str = "p",
        ids: bool = True,
        higher_is_better: bool = True,
        metric: str = METRIC,
        each: int = EACH,
    ) -> None:
        scores = {arm: [score for score in of_arm for _ in range(each)] for arm, of_arm in scores.items()}
        arms = [
            {
                "name": arm,
                "metrics": {metric: {"mean": sum(known) / len(known), "low": min(known), "high": max(known)}},
            }
            for arm, of_arm in scores.items()
            if (known := [score for score in of_arm if score is not None])
        ]
        metrics = [{"name": metric, "higher_is_better": higher_is_better}]
        (folder / "evaluation.json").write_text(json.dumps({"metrics": metrics, "primary": metric, "arms": arms}))
        number = len(next(iter(scores.values())))
        lines = [
            {
                "id": f"{prompts}{index}" if ids else "",
                "messages": [{"role": "user", "content": f"{prompts}{index}"}],
                "answers": {
                    arm: {"text": "", "scores": {} if of_arm[index] is None else {metric: of_arm[index]}}
                    for arm, of_arm in scores.items()
                },
            }
            for index in range(number)
        ]
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (folder / "samples.jsonl").write_text(text)

    def compared(self, *names: str, html: str | None = None, width: int = 160) -> str:
        console = Console(width=width)
        with console.capture() as captured:
            compare(console, self.output, names, html=html)
        return captured.get()


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_what_differs_is_shown_and_nothing_else(runs: Runs) -> None:
    runs.add("a", {"base": [0.1, 0.2, 0.3], "stage:dpo": [0.5, 0.6, 0.7]})
    runs.add("bb", {"base": [0.1, 0.2, 0.3], "stage:dpo": [0.6, 0.7, 0.8]}, beta=0.3)
    printed = runs.compared("a", "bb")
    (setting,) = [line for line in printed.splitlines() if "stages." in line]
    assert setting.split() == ["stages.dpo.beta", "0.1", "0.3"]
    assert "launch" not in printed
    assert "0.600 (0.500–0.700)" in printed
    assert "dpo: bb against a: +0.100 (+0.100 to +0.100), adjusted p 0.0001, better" in printed
    assert "base: bb against a: +0.000 (+0.000 to +0.000), the same on every prompt" in printed


def test_evaluations_of_one_run_are_compared_each_with_its_own(runs: Runs, tmp_path: Path) -> None:
    for name, score in (("a", 0.1), ("b", 0.6)):
        runs.add(name, {"stage:dpo": [score, score]})
        runs.evaluate_again(name, {"stage:dpo": [0.2, 0.2]}, metric="tone")
    page = tmp_path / "page.html"
    printed = runs.compared("a", "b", html=str(page))
    assert "dpo: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0001, better" in printed
    assert "dpo in ood: b against a: +0.000 (+0.000 to +0.000), the same on every prompt" in printed
    assert [line.split()[:-2] for line in printed.splitlines() if "95 %" in line] == [
        ["brevity,", "95", "%"],
        ["ood:", "tone,", "95", "%"],
    ]
    assert "dpo: B is really better than A: +0.500 in brevity" in page.read_text()
    assert "tone" not in page.read_text()


def test_evaluations_are_compared_by_name_whatever_the_reports_show(runs: Runs, tmp_path: Path) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.1]})
    runs.add("b", {"stage:dpo": [0.6, 0.6]})
    runs.evaluate_again("b", {"stage:dpo": [0.9, 0.9]}, metric="tone", shown="ood")
    page = tmp_path / "page.html"
    printed = runs.compared("a", "b", html=str(page))
    assert "dpo in judge: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0001, better" in printed
    assert "in ood" not in printed, "the first run lacks it"
    assert "+0.500" not in page.read_text(), "the page shows another evaluation of b"


def test_evaluations_that_the_reports_show_are_compared_under_different_names(runs: Runs) -> None:
    for name, score in (("a", 0.1), ("b", 0.6)):
        runs.add(name, {"stage:dpo": [score, score]})
    record = (runs.output / "runs/b/run.json").read_text()
    (runs.output / "runs/b/run.json").write_text(record.replace('"judge"', '"grade"'))
    assert "dpo: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0001, better" in runs.compared("a", "b")


def test_three_runs_are_compared_by_the_names_of_their_evaluations(runs: Runs) -> None:
    for name in "abc":
        runs.add(name, {"stage:dpo": [0.1, 0.1]})
    runs.evaluate_again("b", {"stage:dpo": [0.2, 0.2]}, metric="tone", shown="ood")
    record = (runs.output / "runs/c/run.json").read_text()
    (runs.output / "runs/c/run.json").write_text(record.replace('"judge"', '"ood"'))
    printed = runs.compared("a", "b", "c")
    assert "dpo in judge: b against a" in printed
    assert "c against a" not in printed, "the evaluation of c is the second one of b"
    assert [line for line in printed.splitlines() if "95 %" in line][1].split()[:3] == ["ood:", "tone,", "95"]


def test_two_runs_are_compared_with_a_first_one_of_another_name(runs: Runs) -> None:
    for name, score in (("a", 0.1), ("b", 0.6), ("c", 0.9)):
        runs.add(name, {"stage:dpo": [score, score]})
    for name in "bc":
        record = (runs.output / f"runs/{name}/run.json").read_text()
        (runs.output / f"runs/{name}/run.json").write_text(record.replace('"judge"', '"grade"'))
    printed = runs.compared("a", "b", "c")
    assert "dpo: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0002, better" in printed
    assert "dpo: c against a: +0.800 (+0.800 to +0.800), adjusted p 0.0002, better" in printed


def test_tables_of_a_stage_have_the_arms_of_all_runs_as_columns(runs: Runs) -> None:
    for name, value in (("a", 0.25), ("b", 0.75)):
        runs.add(name, None)
        run = runs.output / "runs" / name
        task = {"name": "capitals", "num_fewshot": 2, "num_rows": 20, "all_rows": 20, "metrics": [{"name": "acc"}]}
        arms = [{"name": "stage:dpo", "values": {"capitals/acc": {"value": value, "stderr": 0.1}}}]
        (run / "benchmark.json").write_text(json.dumps({"tasks": [task], "arms": arms}))
        record = json.loads((run / "run.json").read_text())
        record["stages"]["asked"] = {"kind": "benchmark", "state": "done", "artifact": str(run)}
        (run / "run.json").write_text(json.dumps(record))
    printed = runs.compared("a", "b")
    heading, row = [line.split() for line in printed.splitlines() if "asked: Tasks" in line or "capitals/acc" in line]
    assert heading == ["asked:", "Tasks", "a:", "dpo", "b:", "dpo"]
    assert row == ["capitals/acc", "0.250", "±", "0.100", "0.750", "±", "0.100"]
    assert "none of these runs was evaluated" not in printed


def test_settings_that_differ_read_as_one_would_type_them(runs: Runs) -> None:
    runs.add("a", None, scorers=[{"source": "reward", "clip": None}], limit=None, flag=True)
    runs.add("b", None, scorers=[{"source": "reward", "clip": 2.0}], limit=8, flag=False)
    lines = [line.split("  ") for line in runs.compared("a", "b").splitlines() if "stages." in line]
    assert [[word.strip() for word in line if word.strip()] for line in lines] == [
        ["stages.dpo.scorers[0].clip", "not set", "2.0"],
        ["stages.dpo.limit", "not set", "8"],
        ["stages.dpo.flag", "true", "false"],
    ]


def test_differences_are_taken_prompt_by_prompt(runs: Runs) -> None:
    """Each run's own interval is wide, and the difference the same on every prompt."""
    runs.add("a", {"stage:dpo": [0.0, 0.5, 1.0]})
    runs.add("b", {"stage:dpo": [-0.1, 0.4, 0.9]})
    assert "dpo: b against a: -0.100 (-0.100 to -0.100), adjusted p 0.0001, worse" in runs.compared("a", "b")


def test_on_few_prompts_no_run_is_called_better(runs: Runs, tmp_path: Path) -> None:
    """The interval of one prompt has no width, so that it excludes zero whatever chance did."""
    runs.add("a", {"stage:dpo": [0.1] * 9}, each=1)
    runs.add("b", {"stage:dpo": [0.6] * 9}, each=1)
    page = tmp_path / "page.html"
    printed = runs.compared("a", "b", html=str(page))
    assert re.search(r"dpo: b against a: \+0.500 .*, fewer than 10 prompts\n", printed)
    assert "dpo: fewer than 10 prompts, so no difference between B and A can be shown: +0.500" in page.read_text()


def test_differences_are_corrected_for_the_number_of_runs_and_arms(runs: Runs) -> None:
    """Twelve prompts, of which eleven improve: p is 2 · 13 / 2¹², .0063, and of ten such differences none is real."""
    gains = [0.1] * 11 + [-0.1]
    for number, name in enumerate("abcdefghijk"):
        scores = [0.5] * 12 if number == 0 else [0.5 + gain for gain in gains]
        runs.add(name, {"stage:dpo": scores, "base": [0.5] * 12}, each=1)
    (pair,) = re.findall(r"dpo: b against a: .*\n", runs.compared("a", "b"))
    assert re.search(r", adjusted p 0\.00[4-9]\d*, better\n", pair)
    (among_ten,) = re.findall(r"dpo: b against a: .*\n", runs.compared(*"abcdefghijk"))
    assert re.search(r", adjusted p 0\.0[4-9]\d*, no real difference\n", among_ten)


def test_less_of_a_metric_may_be_better(runs: Runs) -> None:
    runs.add("a", {"stage:dpo": [0.0, 0.5, 1.0]}, higher_is_better=False)
    runs.add("b", {"stage:dpo": [-0.1, 0.4, 0.9]}, higher_is_better=False)
    assert "dpo: b against a: -0.100 (-0.100 to -0.100), adjusted p 0.0001, better" in runs.compared("a", "b")


def test_other_prompts_are_not_compared(runs: Runs) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.2]})
    runs.add("b", {"stage:dpo": [0.8, 0.9]}, prompts="q")
    printed = runs.compared("a", "b")
    assert "dpo: b against a: evaluated on different prompts" in printed
    assert "better" not in printed


def test_prompts_without_a_score_in_one_run_count_in_neither(runs: Runs, tmp_path: Path) -> None:
    """A grader gives now and then no grade, and on other prompts in each run."""
    runs.add("a", {"stage:dpo": [0.5, None, 0.5, 0.1]})
    runs.add("b", {"stage:dpo": [0.9, 0.9, 0.7, None]})
    page = tmp_path / "page.html"
    without = ", without 20 prompts that have no score in one of the runs"
    printed = runs.compared("a", "b", html=str(page))
    interval = r"\+0\.300 \(\+0\.2\d\d to \+0\.3\d\d\)"
    assert re.search(rf"dpo: b against a: {interval}, adjusted p 0\.0001, better{without}", printed)
    assert "without 20 prompts that have no score in one of the runs" in page.read_text()


def test_prompts_without_ids_are_told_apart_by_what_they_say(runs: Runs) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.2]}, ids=False)
    runs.add("b", {"stage:dpo": [0.8, 0.9]}, ids=False)
    runs.add("c", {"stage:dpo": [0.8, 0.9]}, ids=False, prompts="q")
    assert "dpo: b against a: +0.700 (+0.700 to +0.700), adjusted p 0.0001, better" in runs.compared("a", "b")
    assert "evaluated on different prompts" in runs.compared("a", "c")


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_what_other_programs_take_for_the_end_of_a_line_may_stand_in_a_prompt(runs: Runs, mark: str) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.2]}, prompts=f"one{mark}two")
    runs.add("b", {"stage:dpo": [0.8, 0.9]}, prompts=f"one{mark}two")
    assert "dpo: b against a: +0.700 (+0.700 to +0.700), adjusted p 0.0001, better" in runs.compared("a", "b")


def test_of_a_stage_that_a_run_lacks_only_that_is_said(runs: Runs) -> None:
    runs.add("a", None)
    runs.add("b", None)
    record = json.loads((runs.output / "runs" / "b" / "run.json").read_text())
    record["config"]["stages"]["ppo"] = {"kind": "ppo", "updates": 4}
    (runs.output / "runs" / "b" / "run.json").write_text(json.dumps(record))
    lines = [line.split() for line in runs.compared("a", "b").splitlines() if "stages." in line]
    assert lines == [["stages.ppo", "–", "ppo"]]


def test_the_name_of_a_stage_may_have_dots(runs: Runs) -> None:
    """Its settings were taken for those of a stage that no run has, and not listed."""
    for name, rate in (("a", 1e-4), ("b", 2e-4)):
        runs.add(name, None)
        record = json.loads((runs.output / "runs" / name / "run.json").read_text())
        record["config"]["stages"] = {"sft": {"lr": rate}, "dpo.v2": {"lr": 10 * rate}}
        (runs.output / "runs" / name / "run.json").write_text(json.dumps(record))
    lines = [line.split() for line in runs.compared("a", "b").splitlines() if "stages." in line]
    assert lines == [["stages.sft.lr", "0.0001", "0.0002"], ["stages.dpo.v2.lr", "0.001", "0.002"]]


def test_a_page_is_written_where_asked_for(runs: Runs, tmp_path: Path) -> None:
    runs.add("a", {"stage:dpo": [0.0, 0.5, 1.0]})
    runs.add("b", {"stage:dpo": [-0.1, 0.4, 0.9]})
    page = tmp_path / "page.html"
    assert f"page: {page}" in runs.compared("a", "b", html=str(page))
    assert "dpo: B is really worse than A: −0.100 in brevity" in page.read_text()
    os.mkfifo(tmp_path / "pipe")  # like a device, it would be replaced; a failing test must not take the machine's
    for path in (str(tmp_path), str(tmp_path / "no" / "page.html"), str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match="cannot be a file"):
            runs.compared("a", "b", html=path)


def test_runs_without_evaluation_still_show_their_settings(runs: Runs) -> None:
    runs.add("a", None)
    runs.add("b", None, beta=0.2)
    printed = runs.compared("a", "b")
    assert "stages.dpo.beta" in printed
    assert "none of these runs was evaluated" in printed
    runs.add("c", None)
    assert "no setting differs" in runs.compared("a", "c")


@pytest.mark.parametrize(
    ("names", "words"),
    [(("a",), "name two runs or more"), (("a", "a"), "the run 'a' is named twice"), (("a", "bq"), "did you mean 'b'")],
)
def test_runs_that_are_not_there_are_refused(runs: Runs, names: tuple[str, ...], words: str) -> None:
    runs.add("a", None)
    runs.add("b", None)
    with pytest.raises(ConfigError) as caught:
        runs.compared(*names)
    assert words in f"{caught.value}"


def test_values_are_whole_on_a_narrow_terminal(runs: Runs) -> None:
    """Long ones often differ at their end."""
    folder = "path:/home/jane/project/data/of/the/year"
    for name in ("a", "b"):
        runs.add(name, {"stage:dpo": [0.5]}, data={"source": f"{folder}/train_{name}.jsonl"})
    printed = runs.compared("a", "b", width=60)
    assert f"{folder}/train_a.jsonl" in printed
    assert f"{folder}/train_b.jsonl" in printed
