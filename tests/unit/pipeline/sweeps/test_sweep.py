"""Sweeps: what is tried and in which order, what a stop or a fault leaves, and which is said to be best."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.config.run import sweep_names
from alignment.core.errors import (
    AlignmentError,
    ConfigError,
    DataError,
    DiskError,
    GateNotMet,
    NonFiniteError,
    Preempted,
    StageError,
    StoreError,
)
from alignment.pipeline.sweeps import run as module
from alignment.pipeline.sweeps.study import JOURNAL
from tests.hub import answer, leave_data_set, use_cache
from tests.unit.pipeline.conftest import ROWS
from tests.unit.pipeline.sweeps.conftest import BETAS, METRIC, Runs, arm, given, go, own, record, trials

GRID: dict[str, Any] = {"search": "grid", "parameters": [{"key": "stages.dpo.beta", "values": [0.1, 0.3]}]}


def betas(runs: Runs) -> list[str]:
    return [settings["stages.dpo.beta"] for settings in runs.asked]


def page(runs: Runs, name: str = "quickstart.dpo_beta") -> str:
    return (runs.output / f"sweeps/{name}/sweep.html").read_text()


def test_a_grid_tries_every_value_once_and_names_the_best(runs: Runs) -> None:
    code, printed = go(runs, "dpo_beta", "seed=7")
    assert (code, betas(runs)) == (0, BETAS)
    assert len({settings["name"] for settings in runs.asked}) == 4
    assert {(settings["seed"], settings["tracking.group"]) for settings in runs.asked} == {("7", "quickstart.dpo_beta")}
    assert ("best: stages.dpo.beta=0.3" in printed, "may be as good" in printed) == (True, False)
    rows = trials(runs)
    assert [row["words"] for row in rows] == [[f"stages.dpo.beta={beta}"] for beta in ("0.3", "0.1", "0.5", "0.05")]
    assert rows[0]["figures"] == [{"mean": 0.9, "low": pytest.approx(0.85), "high": pytest.approx(0.95)}]
    assert go(runs, "dpo_beta", "seed=7", "launch.threads=3")[0] == 0
    assert len(runs.asked) == 4, "all are there, and a launch changes no figure"


def test_of_trials_that_tie_none_is_called_the_best(runs: Runs) -> None:
    runs.figure = lambda settings: 0.5 if float(settings["stages.dpo.beta"]) < 0.4 else 0.4
    _, printed = go(runs)
    tied = [line for line in printed.splitlines() if line.startswith(("best:", "tied: "))]
    assert tied == [f"tied: stages.dpo.beta={beta}" for beta in BETAS[:3]]
    assert record(runs)["verdict"].startswith("trials 0, 1, 2 tie: ")
    assert ("Trials 0, 1 and 2 tie" in page(runs), "Best style_and_facts" in page(runs)) == (True, False)


@pytest.mark.parametrize(("trials", "is_worse"), [(4, True), (12, False)])
def test_the_number_of_trials_counts_in_the_verdict(runs: Runs, tmp_path: Path, trials: int, is_worse: bool) -> None:
    """Ten prompts that are all better: p = 2 / 2¹⁰. Four trials have 6 pairs (p = .012), twelve have 66 (p = .13)."""
    runs.has_prompt = lambda settings, index: index < 10
    parameters = [{"key": "stages.dpo.beta", "values": [round(0.3 + 0.01 * index, 2) for index in range(trials)]}]
    go(runs, own(runs, tmp_path, search="grid", parameters=parameters))
    assert record(runs, "mine")["verdict"].startswith("every other trial is worse") is is_worse
    assert ("may be as good" in record(runs, "mine")["verdict"]) is not is_worse


def test_what_speaks_against_the_best_trial_is_on_the_page_and_in_the_terminal(runs: Runs) -> None:
    runs.more_of_arm = {"ended": {"mean": 0.0}}
    _, printed = go(runs)
    caution = f"trial {trials(runs)[0]['number']}: all answers of dpo were cut off at max_new_tokens"
    assert f"caution: {caution}" in printed
    assert caution.replace("trial", "Trial", 1) in page(runs)
    assert printed.count("were cut off") == 1, "only the best trial's evaluation is of interest"
    _, printed = go(runs, "dpo_beta", "profile=smoke")
    caution = "every trial is a smoke run"
    assert printed.partition("best: ")[2].count(f"caution: {caution}") == 1
    assert printed.count("caution: ") == 2, "before the first trial, and below the table; doubts about figures say less"
    assert caution.capitalize() in page(runs, "quickstart-smoke.dpo_beta")


def shared_arms(runs: Runs, name: str = "dpo_beta") -> list[dict[str, float]]:
    goals = record(runs, name)["goals"]
    return [{label: value["mean"] for label, value in goal["shared_arms"].items()} for goal in goals]


def test_arms_that_all_trials_share_are_shown_to_compare_with(runs: Runs, tmp_path: Path) -> None:
    """A sweep over DPO's beta does not train PPO either, but here the trials measured different values for it."""
    runs.other_arms = lambda settings: [
        arm("base", 0.101),
        arm("stage:sft", 0.528),
        arm("stage:ppo", float(settings.get("stages.dpo.beta", 0))),
    ]
    same = "the same in all trials"
    _, printed = go(runs)
    assert shared_arms(runs) == [{"base": 0.101, "sft": 0.528}]
    assert "of stage:dpo: base 0.101 (0.081–0.121), sft 0.528 (0.508–0.548)\n" in printed.partition(same)[2]
    assert "base 0.101 (0.081 to 0.121) and sft 0.528 (0.508 to 0.548)." in page(runs).partition(same.capitalize())[2]
    runs.figure = lambda settings: 0.5
    rates = [{"key": "stages.sft.optim.lr", "values": [0.0001, 0.0002]}]
    go(runs, own(runs, tmp_path, search="grid", parameters=rates))
    assert "sft" not in shared_arms(runs, "mine")[0], "the settings reach it, even if its value stays"
    of_stage = {"stage": "evaluate", "metric": f"{METRIC}/dpo"}
    assert same not in go(runs, own(runs, tmp_path, objective=of_stage, **GRID))[1]
    assert shared_arms(runs, "mine") == [{}]
    runs.other_arms = lambda settings: [{"name": "base", "metrics": {}}]
    assert same not in go(runs, "dpo_beta", "seed=7")[1], "the base was not measured by this metric"


@pytest.mark.parametrize(
    ("minimize", "reference", "warned"),
    [(False, 0.5, True), (False, 0.499, False), (True, 0.4, True), (True, 0.6, False)],
)
def test_a_sweep_without_a_gain_says_so(
    runs: Runs, tmp_path: Path, minimize: bool, reference: float, warned: bool
) -> None:
    runs.figure = lambda settings: 0.5
    runs.other_arms = lambda settings: [arm("base", reference)]
    objective = {"arm": "stage:dpo", "metric": METRIC, "minimize": minimize}
    _, printed = go(runs, own(runs, tmp_path, objective=objective, **GRID))
    no_gain = f"no trial does better than base ({reference:.3f})"
    assert (no_gain in printed) == (no_gain.capitalize() in page(runs, "quickstart.mine")) == warned


def test_two_objectives_give_the_trials_that_none_beats_in_both(runs: Runs, tmp_path: Path) -> None:
    """Beta .3 has the best score, .5 the fewest words; .1 loses to both, .05 to .1 as well."""
    runs.words = lambda settings: 30.0 - 20.0 * float(settings["stages.dpo.beta"])
    both = [{"arm": "stage:dpo"}, {"stage": "evaluate", "metric": "loss/dpo", "minimize": True}]
    grid = {"search": "grid", "parameters": [{"key": "stages.dpo.beta", "values": [float(beta) for beta in BETAS]}]}
    code, printed = go(runs, own(runs, tmp_path, objective=both, **grid))
    assert (code, "trials 2, 3 are the Pareto set" in printed) == (0, True)
    swept = record(runs, "mine")
    assert [goal["label"] for goal in swept["goals"]] == ["style_and_facts of stage:dpo", "loss/dpo of evaluate"]
    assert (swept["best"], [row["number"] for row in swept["trials"]]) == ([2, 3], [2, 3, 1, 0])
    assert swept["trials"][0]["figures"][1] == {"mean": 24.0, "low": None, "high": None}


def test_a_figure_of_training_rows_is_an_objective_with_a_caution(runs: Runs, tmp_path: Path) -> None:
    def swept(stage: str, metric: str, *more: str) -> tuple[int, str]:
        return go(runs, own(runs, tmp_path, objective={"stage": stage, "metric": metric}, **GRID), *more)

    runs.words = lambda settings: float(settings["stages.dpo.beta"])
    code, printed = swept("evaluate", "style_and_facts/dpo")
    assert (code, "best: stages.dpo.beta=0.3" in printed, "caution" in printed) == (0, True, False)
    for metric, chance in (("rewards/accuracies", 0.5), ("rewards/margins", None)):
        _, printed = swept("dpo", metric)
        assert printed.count(f"caution: {metric} of dpo is measured on the training rows") == 2, "at both ends"
        assert f"{metric.capitalize()} of dpo is measured on the training rows" in page(runs, "quickstart.mine")
        assert record(runs, "mine")["goals"][0]["chance"] == chance, "half of the pairs, but of no margin"
    runs.words = lambda settings: float("nan")
    code, printed = swept("evaluate", "style_and_facts/dpo", "seed=7")
    assert (code, "style_and_facts/dpo of evaluate is not a finite number" in printed) == (5, True)


@pytest.mark.parametrize("code", [75, 130])
def test_stopped_in_a_trial_it_goes_on_with_that_one(runs: Runs, code: int) -> None:
    """Even if the journal ends in half a line, as after a disk that was full."""
    runs.codes[2] = code
    ended, printed = go(runs)
    assert (ended, "stopped" in printed, betas(runs)) == (code, False, BETAS[:3]), "the run has said that it stopped"
    (journal,) = runs.output.rglob(JOURNAL)
    with journal.open("a") as file:
        file.write('{"op_code": 9, "worker_id": "4f')
    for _ in range(2):
        assert go(runs)[0] == 0
    assert betas(runs)[3:] == BETAS[2:]
    assert runs.asked[3]["name"] == runs.asked[2]["name"], "its stages are found again"
    assert all(row["run"].endswith(f".{row['number']}") for row in trials(runs))
    assert [row["state"] for row in trials(runs)] == ["done"] * 4, "a stop is no failure"


def test_a_trial_that_fails_is_listed_with_what_it_said_and_ends_no_sweep(runs: Runs, tmp_path: Path) -> None:
    runs.faults[3] = NonFiniteError("a gradient is not finite at step 4", where="stage dpo")
    code, printed = go(runs, own(runs, tmp_path))
    assert (code, len(runs.asked), "a gradient is not finite" in printed) == (0, 8, True)
    assert [row["state"] for row in trials(runs, "mine")] == [*["done"] * 7, "failed"]
    assert trials(runs, "mine")[-1]["error"] == "stage dpo: a gradient is not finite at step 4"
    assert all(0.01 <= float(beta) <= 1.0 for beta in betas(runs))
    assert len(set(betas(runs))) == 8
    assert {settings["stages.dpo.optim.batch_size"] for settings in runs.asked} <= {"4", "8"}
    assert go(runs, own(runs, tmp_path, trials=9))[0] == 0
    assert len(runs.asked) == 9, "the study is kept"


NO_VERDICTS = {"arm": "stage:dpo", "against": "stage:sft", "wins": 0, "ties": 0, "losses": 0}


@pytest.mark.parametrize(
    ("lost", "objective", "more", "words"),
    [
        ({"gradings": [{"metric": METRIC, "left_out": ["stage:dpo"]}]}, METRIC, [], "replies have no grade"),
        (
            {"judge": {"pairs": [{**NO_VERDICTS, "invalid": 0.5}]}},
            "win_rate",
            ["stages.evaluate.judge.kind=reward"],
            "50% of the verdicts are invalid",
        ),
    ],
)
def test_a_trial_without_grades_or_verdicts_fails_and_ends_no_sweep(
    runs: Runs, tmp_path: Path, lost: dict[str, Any], objective: str, more: list[str], words: str
) -> None:
    runs.lost, runs.figure = lost, lambda settings: None
    file = own(runs, tmp_path, objective={"arm": "stage:dpo", "metric": objective}, **GRID)
    assert go(runs, file, *more)[0] == 5, "every trial fails"
    assert [row["state"] for row in trials(runs, "mine")] == ["failed"] * 2
    assert words in trials(runs, "mine")[0]["error"]


def test_failed_trials_are_tried_again_when_they_are_asked_for(runs: Runs) -> None:
    """A server was away, for example; what has finished is not run again."""
    runs.faults = {number: StageError("the judge does not answer", where="stage evaluate") for number in (1, 5)}
    code, printed = go(runs)
    assert (code, len(runs.asked), "1 trial failed: --retry-failed" in printed) == (0, 4, True)
    assert go(runs)[0] == 0
    assert len(runs.asked) == 4, "not without being asked"
    code, printed = go(runs, retry_failed=True)
    assert (code, len(runs.asked), "--retry-failed" in printed) == (0, 5, False)
    assert runs.asked[4] == runs.asked[1], "the same run with the same settings"
    assert [row["state"] for row in trials(runs)] == ["done"] * 4
    assert go(runs, retry_failed=True)[0] == 0
    assert len(runs.asked) == 5, "nothing is left that failed"


@pytest.mark.parametrize(
    "fault",
    [StoreError("cannot be reached", where="s3://models"), DiskError("no space left on the device", where="out")],
    ids=["store", "disk"],
)
def test_what_hinders_every_trial_fails_none(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, fault: AlignmentError
) -> None:
    """A full disk may leave half a line in the journal, which is cut before the next."""
    runs.faults[1] = fault
    with pytest.raises(type(fault), match=f"{fault.where}: {fault.message}"):
        go(runs)
    assert len(runs.asked) == 2

    def without_room(*_: object, **__: object) -> int:
        with (runs.output / "sweeps/quickstart.dpo_beta" / JOURNAL).open("a") as journal:
            journal.write('{"op_code": 6, "worker')
        raise fault

    with monkeypatch.context() as full:
        full.setattr(module, "run_trial", without_room)
        with pytest.raises(type(fault)):
            go(runs)
    assert go(runs)[0] == 0
    assert ([row["state"] for row in trials(runs)], betas(runs)[2:]) == (["done"] * 4, BETAS[1:])


def test_a_trial_that_misses_a_gate_counts_and_the_gate_is_named(runs: Runs) -> None:
    gate, second = (
        "stages.evaluate.gate[0]: facts of dpo less those of sft: -0.1",
        "stages.evaluate.gate[1]: too little",
    )
    runs.unmet["0.3"] = GateNotMet(f"{gate}\n  {second}", remedy="train longer\n  → use more prompts")
    code, printed = go(runs)
    assert (code, "best: stages.dpo.beta=0.3" in printed) == (0, True)
    assert f"trial 2 does not meet a gate: {gate}\n" in printed
    assert f"caution: trial 2 does not meet a gate: {gate}; {second}\n" in printed
    assert f"stages.dpo.beta=0.3: {gate}; {second}" in " ".join(printed.split())
    best, *others = trials(runs)
    assert (best["number"], best["state"], best["figures"][0]["mean"]) == (2, "done", 0.9)
    assert (best["error"].startswith(gate), [row["error"] for row in others]) == (True, [""] * 3)
    assert gate in page(runs)
    runs.unmet["0.1"] = runs.unmet.pop("0.3")
    assert "caution: " not in go(runs, "dpo_beta", "seed=7")[1], "it is not the best trial"


def test_what_is_drawn_does_not_depend_on_stops_in_between(runs: Runs, tmp_path: Path) -> None:
    def drawn(file: str, *codes: int) -> dict[str, list[str]]:
        shutil.rmtree(runs.output / "sweeps", ignore_errors=True)
        runs.asked.clear()
        assert [go(runs, file)[0] for _ in codes] == list(codes)
        return {of["name"]: [of["stages.dpo.beta"], of["stages.dpo.optim.batch_size"]] for of in runs.asked}

    straight = drawn(own(runs, tmp_path), 0)
    assert len({beta for beta, _ in straight.values()}) == 8
    assert drawn(own(runs, tmp_path, seed=1), 0) != straight
    runs.codes = {1: 75, 5: 130}
    assert drawn(own(runs, tmp_path), 75, 130, 0) == straight
    assert len(runs.asked) == 10, "two were asked for twice"


def of(**objective: object) -> dict[str, Any]:
    return {"objective": objective}


def key(name: str, *values: object) -> dict[str, Any]:
    return {"parameters": [{"key": name, "values": values}]}


DPO = "stage:dpo"
MEDIAN = {"pruner": "median", "stage": "dpo"}
CARD = "+stages.card={kind: reward_card, data: {source: 'bundled:quickstart/preferences'}}"
REFUSED: list[tuple[dict[str, Any], Any]] = [
    (of(arm="stage:dop"), "no stage reports primary of 'stage:dop'"),
    (of(arm=DPO, metric="fatcs"), "did you mean 'facts'"),
    (of(arm=DPO, metric="loss"), "minimize: true"),
    (of(arm=DPO, metric="kl", minimize=True), "stages.evaluate.answers.temperature to 1"),
    (of(arm=DPO, metric="win_rate"), "stages.evaluate.judge.kind to a judge"),
    (of(arm="base+prompt", metric="greedy_log_ratio", minimize=True), "other prompts"),
    (of(stage="rewrad"), "did you mean 'reward'"),
    (of(stage="ppo", metric="guard/kl", minimize=True), "stages.ppo.guard.every above 0"),
    (of(stage="report", metric="style"), "reports no metric"),
    (of(stage="dpo", metric="validation/loss", minimize=True), "stages.dpo.validation.every above 0"),
    ({**key("stages.dpo.validation", "{share: 0.2, every: 2}", "{every: 0}"),
      **of(stage="dpo", metric="validation/loss", minimize=True)}, "stages.dpo.validation.every above 0"),
    ({"objective": [{"arm": DPO}, {"arm": "stage:dop"}]}, "objective[1]"),
    ({"parameters": GRID["parameters"] * 2}, "parameters[1]: stages.dpo.beta is listed twice"),
    (key("stages.dpo.bata", 0.1), "mine.yaml: stages.dpo.bata"),
    (key("stages.dpo.optim.batch_size", 8, 100_000), "stages.dpo.optim.warmup_ratio"),
    ({"search": "grid"}, "a grid needs values"),
    ({**GRID, "trials": 3}, "remove trials"),
    ({"trials": None}, "number of trials"),
    ({"pruning": {**MEDIAN, "stage": "sft", "metric": "validation/loss"}}, "without validation"),
    ({"pruning": {**MEDIAN, "stage": ""}, "objective": [{"arm": DPO}, {"arm": "stage:sft"}]}, "several objectives"),
]  # fmt: skip
ARMS = "stages.evaluate.arms=[base,base+prompt,base+few-shot,'stage:sft','stage:dpo']"


@pytest.mark.parametrize(("changes", "word"), REFUSED)
def test_an_impossible_sweep_starts_nothing(runs: Runs, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        go(runs, own(runs, tmp_path, **changes), ARMS)
    assert word in str(caught.value)
    assert runs.asked == []


SAMPLED = "stages.evaluate.answers={per_prompt: 2, temperature: 1.0}"
BY_METRIC = "stages.evaluate.judge.kind=metric"
LOOKS = "stages.dpo.validation={share: 0.2, every: 2}"
GOLD = "stages.evaluate.metrics=[{name: gold, source: length, target: 9}]"
FAR = "stages.evaluate.metrics=[{name: far, source: length, target: 9, higher_is_better: false}]"


@pytest.mark.parametrize(
    ("changes", "override", "word"),
    [
        (of(arm=DPO, metric="greedy_log_ratio", minimize=True), SAMPLED, "temperature 1"),
        (of(arm="stage:sft", metric="win_rate"), BY_METRIC, "stages.evaluate.judge.pairs"),
        (of(arm=DPO), "stages.evaluate.metrics=[]", "stages.evaluate.metrics is empty"),
        (of(arm=DPO), FAR, "minimize: true"),
        ({"pruning": {**MEDIAN, "metric": "validation/last_loss", "minimize": True}}, LOOKS, "only at its end"),
        ({"pruning": {**MEDIAN, "metric": "validation/accuracy", "minimize": True}}, LOOKS, "minimize: false"),
        ({"pruning": MEDIAN}, "launch/backend=slurm", "Slurm jobs cannot be pruned"),
        ({"pruning": {**MEDIAN, "stage": "card"}}, CARD, "one of: sft, reward, dpo, ppo"),
        ({}, "launch.backend={kind: slurm, wait: false}", "launch.backend.wait"),
        (of(arm=DPO, metric="kl", minimize=True), SAMPLED, ""),
        (of(arm=DPO), GOLD, ""),
        (of(stage="dpo", metric="validation/loss", minimize=True), LOOKS, ""),
        ({"pruning": {**MEDIAN, "metric": "validation/accuracy", "minimize": False}}, LOOKS, ""),
    ],
)
def test_settings_decide_what_is_reported(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], override: str, word: str
) -> None:
    overrides = [*given(runs), "~stages.evaluate_sft", ARMS, override]
    file = own(runs, tmp_path, **changes)
    if word:
        with pytest.raises(ConfigError) as caught:
            module.read_sweep("quickstart", file, overrides)
        assert word in str(caught.value)
        return
    (goal,) = module.read_sweep("quickstart", file, overrides).objectives
    asked = changes.get("objective", {"arm": DPO})
    default = "gold" if override == GOLD else METRIC
    assert str(goal) == f"{asked.get('metric', default)} of {asked.get('arm') or asked['stage']}"


def test_a_file_that_is_no_sweep_is_refused(runs: Runs, tmp_path: Path) -> None:
    named, twice = Path(own(runs, tmp_path)).rename(tmp_path / "my betas.yaml"), tmp_path / "twice.yaml"
    twice.write_text("parameters:\n- key: stages.dpo.beta\n  values: [0.1]\n  values: [0.3]\n")
    for sweep, words in (
        (named, "'my betas' cannot name a sweep"),
        (twice, "line 4"),
        ("dpo_bata", "dpo_bata: .* did you mean 'dpo_beta'"),
    ):
        with pytest.raises(ConfigError, match=words):
            go(runs, str(sweep))


@pytest.mark.parametrize("name", sweep_names())
def test_every_shipped_sweep_fits_the_quickstart(runs: Runs, name: str) -> None:
    module.read_sweep("quickstart", name, [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}"])


SOURCE = "stages.sft.data.source=hub:org/name@v1"


def test_a_figure_that_the_evaluation_turns_out_not_to_tell_ends_the_sweep(runs: Runs) -> None:
    runs.figure = lambda settings: None
    with pytest.raises(ConfigError, match="no stage reports style_and_facts of stage:dpo"):
        go(runs)
    assert len(runs.asked) == 1


def test_a_sweep_that_cannot_begin_downloads_nothing(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(monkeypatch, tmp_path)
    answer(monkeypatch, TimeoutError("it was asked for the data set"))
    with pytest.raises(ConfigError, match=r"name: a trial's run would be called 'a{60}\.dpo_beta\.3'"):
        go(runs, "dpo_beta", SOURCE, f"name={'a' * 60}")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="sweeps need optuna"):
        go(runs, "dpo_beta", SOURCE)


def test_a_trial_whose_job_was_cancelled_or_whose_process_was_killed_is_tried_again(runs: Runs) -> None:
    class Killed(BaseException):
        pass

    runs.faults[1] = Preempted("job 11 ended as CANCELLED", where="stage sft")
    runs.faults[2] = Killed()  # type: ignore[assignment]
    code, printed = go(runs)
    assert (code, "trial 1 was stopped: stage sft: job 11 ended as CANCELLED" in printed) == (75, True)
    with pytest.raises(Killed):
        go(runs)
    assert go(runs)[0] == 0
    assert betas(runs) == [*BETAS[:2], BETAS[1], *BETAS[1:]]
    assert [row["state"] for row in trials(runs)] == ["done"] * 4
    assert runs.asked[3]["name"] == runs.asked[2]["name"] == runs.asked[1]["name"]


def test_names_that_become_too_long_for_later_trials_start_none(runs: Runs, tmp_path: Path) -> None:
    """A run's name has up to 64 characters, and the eighth trial's is RUN.mine.7."""
    name = f"name={'a' * 57}"
    assert go(runs, own(runs, tmp_path, trials=8), name)[0] == 0
    assert len(runs.asked[-1]["name"]) == 64
    (journal,) = runs.output.rglob(JOURNAL)
    before = journal.read_bytes()
    with pytest.raises(ConfigError, match=r"name: a trial's run would be called 'a{57}\.mine\.10' \(65 characters\); "):
        go(runs, own(runs, tmp_path, trials=11), name)
    assert (len(runs.asked), journal.read_bytes() == before) == (8, True), "a sweep that is refused leaves no study"


FILES = {"data/train.jsonl": (json.dumps(ROWS["conversations"]) + "\n") * 2}


def test_data_is_downloaded_once_before_the_first_trial(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(monkeypatch, tmp_path)
    with monkeypatch.context() as patched:
        answer(patched, TimeoutError("timed out"))
        with pytest.raises(DataError, match="timed out") as caught:
            go(runs, "dpo_beta", SOURCE)
    assert (caught.value.where, runs.asked) == ("hub:org/name@v1", [])
    with monkeypatch.context() as patched:

        def download() -> Path:
            patched.undo()  # asked again, the client itself finds what the download has left
            return leave_data_set(tmp_path, FILES, revision="v1")

        def figure(settings: dict[str, str]) -> float:
            download()  # a run would do so as well
            return float(settings["stages.dpo.beta"])

        answer(patched, download)
        runs.figure = figure
        _, printed = go(runs, "dpo_beta", SOURCE)
    assert printed.count("downloading the data set org/name@v1 from its hub") == 1
    assert len(runs.asked) == 4
    assert go(runs, "dpo_beta", SOURCE)[0] == 0
    assert len(runs.asked) == 4, "its trials are found again"
