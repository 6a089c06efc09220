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

Scores = dict[str, list[float | None]]


class Runs:
    def __init__(self, output: Path) -> None:
        self.output = output
        self.page = output / "page.html"

    def add(self, name: str, scores: Scores | None = None, *, stage: str = "judge", **changes: Any) -> None:
        """A run; with ``scores`` of its arms it has an evaluation. ``changes`` are settings of its stage dpo, or of
        ``evaluate``."""
        run = self.output / "runs" / name
        run.mkdir(parents=True)
        asked = {key: changes.pop(key) for key in ("prompts", "ids", "higher_is_better", "each") if key in changes}
        stages = {"sft": {"lr": 1e-4}, "dpo": {"beta": 0.1, **changes}}
        config = {"name": name, "seed": 1, "launch": {"threads": len(name)}, "stages": stages}
        entries = {"dpo": {"kind": "dpo", "artifact": str(run / "none")}}
        if scores is not None:
            entries[stage] = {"kind": "evaluate", "artifact": str(run)}
            self.evaluate(run, scores, **asked)
        (run / "run.json").write_text(json.dumps({"config": config, "stages": entries}))

    def change(self, name: str, part: str, **entries: Any) -> None:
        file = self.output / "runs" / name / "run.json"
        record = json.loads(file.read_text())
        (record["config"]["stages"] if part == "config" else record["stages"]).update(entries)
        file.write_text(json.dumps(record))

    def evaluate_again(self, name: str, scores: Scores, *, shown: str = "judge") -> None:
        """Adds the evaluation ``ood`` with the metric tone, and a report that shows ``shown``."""
        folder = self.output / "runs" / name / "ood"
        folder.mkdir()
        self.evaluate(folder, scores, prompts="o", metric="tone")
        report = {"kind": "report", "inputs": {"evaluation": f"stage:{shown}"}}
        self.change(name, "stages", ood={"kind": "evaluate", "artifact": str(folder)}, report=report)

    def evaluate(
        self,
        folder: Path,
        scores: Scores,
        *,
        prompts: str = "p",
        ids: bool = True,
        higher_is_better: bool = True,
        metric: str = "brevity",
        each: int = 10,
    ) -> None:
        scores = {arm: [score for score in of_arm for _ in range(each)] for arm, of_arm in scores.items()}
        arms = [
            {"name": arm, "metrics": {metric: {"mean": sum(known) / len(known), "low": min(known), "high": max(known)}}}
            for arm, of_arm in scores.items()
            if (known := [score for score in of_arm if score is not None])
        ]
        metrics = [{"name": metric, "higher_is_better": higher_is_better}]
        (folder / "evaluation.json").write_text(json.dumps({"metrics": metrics, "primary": metric, "arms": arms}))
        lines = [
            {
                "id": f"{prompts}{index}" if ids else "",
                "messages": [{"role": "user", "content": f"{prompts}{index}"}],
                "answers": {
                    arm: {"text": "", "scores": {} if of_arm[index] is None else {metric: of_arm[index]}}
                    for arm, of_arm in scores.items()
                },
            }
            for index in range(len(next(iter(scores.values()))))
        ]
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        (folder / "samples.jsonl").write_text(text)

    def compared(self, *names: str, html: str | None = None, width: int = 160) -> str:
        console = Console(width=width)
        with console.capture() as captured:
            compare(console, self.output, names, html=html)
        return captured.get()

    def differences(self, *names: str, html: bool = False) -> list[str]:
        printed = self.compared(*names, html=str(self.page) if html else None)
        return [line for line in printed.splitlines() if " against " in line]

    def settings(self, *names: str) -> list[list[str]]:
        lines = [re.split(r"\s{2,}", line.strip()) for line in self.compared(*names).splitlines()]
        return [line for line in lines if line[0].startswith("stages.")]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_settings_that_differ_read_as_one_would_type_them(runs: Runs) -> None:
    runs.add("a", scorers=[{"source": "reward", "clip": None}], limit=None, flag=True)
    runs.add("bb", scorers=[{"source": "reward", "clip": 2.0}], limit=8, flag=False, beta=0.3)
    assert runs.settings("a", "bb") == [
        ["stages.dpo.beta", "0.1", "0.3"],
        ["stages.dpo.scorers[0].clip", "not set", "2.0"],
        ["stages.dpo.limit", "not set", "8"],
        ["stages.dpo.flag", "true", "false"],
    ]
    printed = runs.compared("a", "bb")
    assert "launch" not in printed
    assert "none of these runs was evaluated" in printed
    runs.add("c", scorers=[{"source": "reward", "clip": None}], limit=None, flag=True)
    assert "no setting differs" in runs.compared("a", "c")


def test_stages_are_told_apart_by_their_names(runs: Runs) -> None:
    """A name may have dots. Of a stage that a run lacks only that is said."""
    for name, rate in (("a", 1e-3), ("b", 2e-3)):
        runs.add(name)
        runs.change(name, "config", **{"dpo.v2": {"lr": rate}})
    runs.change("b", "config", ppo={"kind": "ppo", "updates": 4})
    assert runs.settings("a", "b") == [["stages.dpo.v2.lr", "0.001", "0.002"], ["stages.ppo", "–", "ppo"]]


def test_values_are_whole_on_a_narrow_terminal(runs: Runs) -> None:
    """Long ones often differ at their end."""
    folder = "path:/home/jane/project/data/of/the/year"
    for name in ("a", "b"):
        runs.add(name, {"stage:dpo": [0.5]}, data={"source": f"{folder}/train_{name}.jsonl"})
    printed = runs.compared("a", "b", width=60)
    assert f"{folder}/train_a.jsonl" in printed
    assert f"{folder}/train_b.jsonl" in printed


REAL = "dpo: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0001, better"
WORSE = "dpo: b against a: -0.100 (-0.100 to -0.100), adjusted p 0.0001, "


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        # each run's own interval is wide, and the difference the same on every prompt
        ({"scores": [0.0, 0.5, 1.0]}, {"scores": [-0.1, 0.4, 0.9]}, WORSE + "worse"),
        (
            {"scores": [0.0, 0.5, 1.0], "higher_is_better": False},
            {"scores": [-0.1, 0.4, 0.9], "higher_is_better": False},
            WORSE + "better",
        ),
        ({"scores": [0.1]}, {"scores": [0.1]}, "dpo: b against a: +0.000 (+0.000 to +0.000), the same on every prompt"),
        (
            {"scores": [0.1, 0.2]},
            {"scores": [0.8, 0.9], "prompts": "q"},
            "dpo: b against a: evaluated on different prompts, so the two cannot be compared",
        ),
        ({"scores": [0.1, 0.2], "ids": False}, {"scores": [0.6, 0.7], "ids": False}, REAL),
        (
            {"scores": [0.1, 0.2], "ids": False},
            {"scores": [0.6, 0.7], "ids": False, "prompts": "q"},
            "dpo: b against a: evaluated on different prompts, so the two cannot be compared",
        ),
        # what other programs take for the end of a line
        *(
            ({"scores": [0.1, 0.2], "prompts": f"1{mark}2"}, {"scores": [0.6, 0.7], "prompts": f"1{mark}2"}, REAL)
            for mark in ("\u2028", "\x85")
        ),
    ],
)
def test_differences_are_taken_prompt_by_prompt(
    runs: Runs, first: dict[str, Any], second: dict[str, Any], difference: str
) -> None:
    for name, changes in (("a", first), ("b", second)):
        scores = changes.pop("scores")
        runs.add(name, {"base": [0.1] * len(scores), "stage:dpo": scores}, **changes)
    printed = {line for line in runs.differences("a", "b") if line.startswith("dpo")}
    assert printed == {difference}
    assert len(runs.differences("a", "b")) == 2, "the base is compared too"


def test_arms_are_shown_with_their_intervals_and_on_a_page(runs: Runs, tmp_path: Path) -> None:
    runs.add("a", {"stage:dpo": [0.5, 0.6, 0.7]})
    runs.add("b", {"stage:dpo": [0.4, 0.5, 0.6]})
    printed = runs.compared("a", "b", html=str(runs.page))
    assert re.search(r"dpo +0\.600 \(0\.500–0\.700\) +0\.500 \(0\.400–0\.600\)", printed)
    assert f"page: {runs.page}" in printed
    assert "dpo: B is really worse than A: −0.100 in brevity" in runs.page.read_text()
    os.mkfifo(tmp_path / "pipe")  # like a device, it would be replaced; a failing test must not take the machine's
    for path in (str(tmp_path), str(tmp_path / "no" / "page.html"), str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match="cannot be a file"):
            runs.compared("a", "b", html=path)


def test_on_few_prompts_no_run_is_called_better(runs: Runs) -> None:
    """The interval of one prompt has no width, so that it excludes zero whatever chance did."""
    runs.add("a", {"stage:dpo": [0.1] * 9}, each=1)
    runs.add("b", {"stage:dpo": [0.6] * 9}, each=1)
    (line,) = runs.differences("a", "b", html=True)
    assert re.fullmatch(r"dpo: b against a: \+0\.500 .*, fewer than 10 prompts", line)
    assert "dpo: fewer than 10 prompts, so no difference between B and A can be shown: +0.500" in runs.page.read_text()


def test_prompts_without_a_score_in_one_run_count_in_neither(runs: Runs) -> None:
    """A grader gives now and then no grade, and on other prompts in each run."""
    runs.add("a", {"stage:dpo": [0.5, None, 0.5, 0.1]})
    runs.add("b", {"stage:dpo": [0.9, 0.9, 0.7, None]})
    without = "without 20 prompts that have no score in one of the runs"
    (line,) = runs.differences("a", "b", html=True)
    interval = r"\+0\.300 \(\+0\.2\d\d to \+0\.3\d\d\)"
    assert re.fullmatch(rf"dpo: b against a: {interval}, adjusted p 0\.0001, better, {without}", line)
    assert without in runs.page.read_text()


def test_differences_are_corrected_for_the_number_of_runs_and_arms(runs: Runs) -> None:
    """Twelve prompts, of which eleven improve: p is 2 · 13 / 2¹², .0063, and of ten such differences none is real."""
    names = "abcdefghijk"
    for number, name in enumerate(names):
        scores = [0.5 + (gain if number else 0.0) for gain in [0.1] * 11 + [-0.1]]
        runs.add(name, {"stage:dpo": scores, "base": [0.5] * 12}, each=1)
    for compared, expected in (("ab", r"0\.00[4-9]\d*, better"), (names, r"0\.0[4-9]\d*, no real difference")):
        assert re.search(rf", adjusted p {expected}$", runs.differences(*compared)[0])


def test_evaluations_of_one_run_are_compared_each_with_its_own(runs: Runs) -> None:
    for name, score in (("a", 0.1), ("b", 0.6)):
        runs.add(name, {"stage:dpo": [score, score]})
        runs.evaluate_again(name, {"stage:dpo": [0.2, 0.2]})
    printed = runs.compared("a", "b", html=str(runs.page))
    assert runs.differences("a", "b") == [
        REAL,
        "dpo in ood: b against a: +0.000 (+0.000 to +0.000), the same on every prompt",
    ]
    assert [line.split(" 95 %")[0] for line in printed.splitlines() if "95 %" in line] == ["brevity,", "ood: tone,"]
    assert "dpo: B is really better than A: +0.500 in brevity" in runs.page.read_text()
    assert "tone" not in runs.page.read_text()


def test_evaluations_are_compared_by_name_whatever_the_reports_show(runs: Runs) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.1]})
    runs.add("b", {"stage:dpo": [0.6, 0.6]})
    runs.evaluate_again("b", {"stage:dpo": [0.9, 0.9]}, shown="ood")
    assert runs.differences("a", "b", html=True) == [REAL.replace("dpo:", "dpo in judge:")], "the first run lacks ood"
    assert "+0.500" not in runs.page.read_text(), "the page shows another evaluation of b"
    runs.add("c", {"stage:dpo": [0.1, 0.1]}, stage="ood")
    assert [line.partition(" against")[0] for line in runs.differences("a", "b", "c")] == ["dpo in judge: b"]
    headings = [line.split()[:2] for line in runs.compared("a", "b", "c").splitlines() if "95 %" in line]
    assert headings[1] == ["ood:", "tone,"], "that of c is the second one of b"


def test_evaluations_that_the_reports_show_are_compared_under_different_names(runs: Runs) -> None:
    runs.add("a", {"stage:dpo": [0.1, 0.1]})
    for name, score in (("b", 0.6), ("c", 0.9)):
        runs.add(name, {"stage:dpo": [score, score]}, stage="grade")
    assert runs.differences("a", "b") == [REAL]
    assert runs.differences("a", "b", "c") == [
        "dpo: b against a: +0.500 (+0.500 to +0.500), adjusted p 0.0002, better",
        "dpo: c against a: +0.800 (+0.800 to +0.800), adjusted p 0.0002, better",
    ]


def test_tables_of_a_stage_have_the_arms_of_all_runs_as_columns(runs: Runs) -> None:
    for name, value in (("a", 0.25), ("b", 0.75)):
        runs.add(name)
        run = runs.output / "runs" / name
        task = {"name": "capitals", "num_fewshot": 2, "num_rows": 20, "all_rows": 20, "metrics": [{"name": "acc"}]}
        arms = [{"name": "stage:dpo", "values": {"capitals/acc": {"value": value, "stderr": 0.1}}}]
        (run / "benchmark.json").write_text(json.dumps({"tasks": [task], "arms": arms}))
        runs.change(name, "stages", asked={"kind": "benchmark", "state": "done", "artifact": str(run)})
    printed = runs.compared("a", "b")
    heading, row = [line.split() for line in printed.splitlines() if "asked: Tasks" in line or "capitals/acc" in line]
    assert heading == ["asked:", "Tasks", "a:", "dpo", "b:", "dpo"]
    assert row == ["capitals/acc", "0.250", "±", "0.100", "0.750", "±", "0.100"]
    assert "none of these runs was evaluated" not in printed


@pytest.mark.parametrize(
    ("names", "words"),
    [(("a",), "name two runs or more"), (("a", "a"), "a: is named twice"), (("a", "bq"), "did you mean 'b'")],
)
def test_runs_that_are_not_there_are_refused(runs: Runs, names: tuple[str, ...], words: str) -> None:
    runs.add("a")
    runs.add("b")
    with pytest.raises(ConfigError, match=words):
        runs.compared(*names)
