"""Sweeps: what is tried and in which order, what a stop or a fault leaves, and which is said to be best."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignment.config.store import conf_folder
from alignment.core.errors import (
    AlignmentError,
    ConfigError,
    DiskError,
    GateNotMet,
    NonFiniteError,
    Preempted,
    StageError,
    StoreError,
)
from alignment.pipeline.sweeps import run as module
from alignment.pipeline.sweeps.study import JOURNAL
from tests.unit.pipeline.sweeps.fake_runs import BETAS, METRIC, Runs, arm, go, own, shared_arms, trials

GRID = [{"key": "stages.dpo.beta", "values": [0.1, 0.3]}]


def test_a_grid_tries_every_value_once_and_names_the_best(runs: Runs) -> None:
    code, printed = go(runs, "dpo_beta", "seed=7")
    assert code == 0
    assert [settings["stages.dpo.beta"] for settings in runs.asked] == BETAS
    assert len({settings["name"] for settings in runs.asked}) == 4
    assert all(settings["seed"] == "7" for settings in runs.asked)
    assert {settings["tracking.group"] for settings in runs.asked} == {"quickstart.dpo_beta"}
    assert "best: stages.dpo.beta=0.3" in printed
    assert "may be as good" not in printed
    rows = trials(runs)
    assert [row["words"] for row in rows] == [[f"stages.dpo.beta={beta}"] for beta in ("0.3", "0.1", "0.5", "0.05")]
    assert rows[0]["figures"] == [{"mean": 0.9, "low": pytest.approx(0.85), "high": pytest.approx(0.95)}]
    code, _ = go(runs, "dpo_beta", "seed=7", "launch.threads=3")
    assert (code, len(runs.asked)) == (0, 4), "all are there, and a launch changes no figure"


@pytest.mark.parametrize(("metric", "chance"), [("rewards/accuracies", 0.5), ("rewards/margins", None)])
def test_a_share_of_pairs_is_half_by_chance(runs: Runs, tmp_path: Path, metric: str, chance: float | None) -> None:
    objective = {"stage": "dpo", "metric": metric}
    assert go(runs, own(runs, tmp_path, search="grid", parameters=GRID, objective=objective))[0] == 0
    (sweep_file,) = runs.output.glob("sweeps/*/sweep.json")
    (goal,) = json.loads(sweep_file.read_text())["goals"]
    assert goal["chance"] == chance


def test_what_was_found_under_other_settings_is_not_told_as_these(runs: Runs, tmp_path: Path) -> None:
    grid = {"search": "grid", "parameters": [{"key": "stages.dpo.beta", "values": [0.1, 0.3]}]}
    go(runs, own(runs, tmp_path, **grid))
    go(runs, own(runs, tmp_path, **grid), "seed=7")
    assert len(runs.asked) == 4, "another seed"
    go(runs, own(runs, tmp_path, **grid, objective={"arm": "stage:dpo", "minimize": True}))
    assert len(runs.asked) == 6, "another objective"
    grid["parameters"] = [{"key": "stages.dpo.beta", "values": [0.1, 0.3, 0.5]}]
    assert go(runs, own(runs, tmp_path, **grid))[0] == 0
    assert len(runs.asked) == 9, "another value"


def test_what_any_of_the_values_names_counts_not_only_the_first(runs: Runs, tmp_path: Path) -> None:
    """A corrected file, and a stage that only one of the values reads."""
    runs.figure = lambda settings: 0.5
    pair = '{"prompt": "2 + 2?", "chosen": "4.", "rejected": "5."}\n'
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    for file in (first, second):
        file.write_text(pair * 40)
    data = {"key": "stages.dpo.data.source", "values": [f"path:{first}", f"path:{second}"]}
    grid = own(runs, tmp_path, search="grid", parameters=[data])
    go(runs, grid)
    second.write_text(pair.replace("5.", "6.") * 40)
    go(runs, grid)
    assert len(runs.asked) == 4
    start = {"key": "stages.dpo.init", "values": ["base", "stage:sft"]}
    objective = {"stage": "dpo", "metric": "rewards/margins"}
    grid = own(runs, tmp_path, search="grid", parameters=[start], objective=objective)
    go(runs, grid)
    go(runs, grid, "stages.sft.optim.lr=1e-5")
    assert len(runs.asked) == 8


def test_a_study_that_is_gone_back_to_says_again_what_it_said(runs: Runs) -> None:
    runs.figure = lambda settings: 0.5 if "seed" in settings else 0.9 - abs(float(settings["stages.dpo.beta"]) - 0.3)
    sweep_file = runs.output / "sweeps/quickstart.dpo_beta/sweep.json"
    go(runs)
    first = json.loads(sweep_file.read_text())
    go(runs, "dpo_beta", "seed=7")
    assert " tie: " in json.loads(sweep_file.read_text())["verdict"]
    assert go(runs)[0] == 0
    assert len(runs.asked) == 8, "nothing was tried again"
    assert json.loads(sweep_file.read_text()) == first
    assert first["verdict"] == "every other trial is worse, paired by prompt, by more than chance explains"
    assert len({settings["name"] for settings in runs.asked}) == 8, "a page shows the trial that it is called after"
    assert all(trial["report"].startswith(f"../../runs/{trial['run']}/") for trial in first["trials"])
    shutil.rmtree(runs.output / "runs")
    assert go(runs)[0] == 0
    assert json.loads(sweep_file.read_text())["verdict"] == first["verdict"], "read from the artifacts"


def test_of_trials_that_tie_none_is_called_the_best(runs: Runs) -> None:
    runs.figure = lambda settings: 0.5 if float(settings["stages.dpo.beta"]) < 0.4 else 0.4
    _, printed = go(runs)
    assert "best:" not in printed
    assert [line for line in printed.splitlines() if line.startswith("tied: ")] == [
        f"tied: stages.dpo.beta={beta}" for beta in BETAS[:3]
    ]
    verdict = "trials 0, 1, 2 tie: their values are equal; every other trial is worse"
    assert f"\n{verdict}" in printed
    page = (runs.output / "sweeps/quickstart.dpo_beta/sweep.html").read_text()
    assert "Trials 0, 1 and 2 tie" in page
    assert "Best style_and_facts" not in page


@pytest.mark.parametrize(("trials", "is_worse"), [(4, True), (12, False)])
def test_the_number_of_trials_counts_in_whether_the_others_are_worse(
    runs: Runs, tmp_path: Path, trials: int, is_worse: bool
) -> None:
    """Ten prompts that are all better: p = 2 / 2¹⁰. Four trials have 6 pairs (p = .012), twelve have 66 (p = .13)."""
    runs.has_prompt = lambda settings, index: index < 10
    parameters = [{"key": "stages.dpo.beta", "values": [round(0.3 + 0.01 * index, 2) for index in range(trials)]}]
    go(runs, own(runs, tmp_path, search="grid", parameters=parameters))
    (sweep_file,) = runs.output.glob("sweeps/*/sweep.json")
    verdict = json.loads(sweep_file.read_text())["verdict"]
    assert verdict.startswith("every other trial is worse") is is_worse
    assert ("may be as good" in verdict) is not is_worse


def test_no_verdict_rests_on_fewer_than_ten_prompts(runs: Runs) -> None:
    runs.has_prompt = lambda settings, index: index < 9
    go(runs)
    (sweep_file,) = runs.output.glob("sweeps/*/sweep.json")
    assert json.loads(sweep_file.read_text())["verdict"] == ""


def test_a_trial_that_cannot_be_compared_is_not_called_worse(runs: Runs) -> None:
    """Trial 0 has too few prompts in common with the best one, trial 1 enough."""
    shared = {"0.05": range(6, 12), "0.1": range(11), "0.3": range(12), "0.5": range(12)}
    runs.has_prompt = lambda settings, index: index in shared[settings["stages.dpo.beta"]]
    (sweep_file,) = [go(runs), *runs.output.glob("sweeps/*/sweep.json")][1:]
    assert json.loads(sweep_file.read_text())["verdict"] == (
        "each trial that can be compared is worse, paired by prompt, by more than chance explains; "
        "trial 0 cannot be compared on 10 prompts or more"
    )


def test_a_trial_that_leads_only_on_prompts_of_its_own_is_not_called_better(runs: Runs) -> None:
    """Beta .3 has the best figure, but each of its scores on the shared prompts is lower."""
    runs.score = lambda settings, mean: mean - 0.5 * (settings["stages.dpo.beta"] == "0.3")
    go(runs)
    (sweep_file,) = runs.output.glob("sweeps/*/sweep.json")
    assert json.loads(sweep_file.read_text())["verdict"].startswith("trials 1, 3, 0 may be as good")


def test_what_speaks_against_the_best_trial_is_on_the_page_and_in_the_terminal(runs: Runs) -> None:
    runs.more_of_arm = {"ended": {"mean": 0.0}}
    _, printed = go(runs)
    best = trials(runs)[0]["number"]
    caution = f"trial {best}: all answers of dpo were cut off at max_new_tokens"
    assert f"caution: {caution}" in printed
    assert caution.replace("trial", "Trial", 1) in (runs.output / "sweeps/quickstart.dpo_beta/sweep.html").read_text()
    assert printed.count("were cut off") == 1, "only the best trial's evaluation is of interest"


def test_a_sweep_of_smoke_runs_says_under_its_table_that_its_figures_mean_nothing(runs: Runs) -> None:
    runs.more_of_arm = {"ended": {"mean": 0.0}}
    _, printed = go(runs, "dpo_beta", "profile=smoke")
    caution = "every trial is a smoke run: it shows only that the recipe runs; its numbers mean nothing"
    assert printed.partition("best: ")[2].count(f"caution: {caution}\n") == 1
    assert printed.count("caution: ") == 2, "before the first trial, and below the table; doubts about figures say less"
    page = (runs.output / "sweeps/quickstart-smoke.dpo_beta/sweep.html").read_text()
    assert f"{caution.replace('every', 'Every', 1)}." in page


def test_arms_that_all_trials_share_are_shown_to_compare_with(runs: Runs) -> None:
    """A sweep over DPO's beta does not train PPO either, but here the trials measured different values for it."""
    runs.other_arms = lambda settings: [
        arm("base", 0.101),
        arm("stage:sft", 0.528),
        arm("stage:ppo", float(settings["stages.dpo.beta"])),
    ]
    _, printed = go(runs)
    assert shared_arms(runs) == [{"base": 0.101, "sft": 0.528}]
    begins = "the same in all trials, to compare with style_and_facts of stage:dpo: base 0.101"
    assert f"\n{begins} (0.081–0.121), sft 0.528 (0.508–0.548)\n" in printed
    page = (runs.output / "sweeps/quickstart.dpo_beta/sweep.html").read_text()
    assert f"{begins.capitalize()} (0.081 to 0.121) and sft 0.528 (0.508 to 0.548)." in page


@pytest.mark.parametrize(("sft", "warned"), [(0.5, True), (0.499, False)])
def test_a_sweep_whose_best_trial_gains_nothing_says_so(runs: Runs, sft: float, warned: bool) -> None:
    runs.figure = lambda settings: 0.5 if settings["stages.dpo.beta"] == "0.3" else 0.4
    runs.other_arms = lambda settings: [arm("base", 0.101), arm("stage:sft", sft)]
    _, printed = go(runs)
    no_gain = "no trial does better than sft (0.500), which the sweep does not change"
    assert (f"{no_gain}\nbest: " in printed) == warned
    page = (runs.output / "sweeps/quickstart.dpo_beta/sweep.html").read_text()
    assert (f'<p class="lead">{no_gain.capitalize()}. Best ' in page) == warned


@pytest.mark.parametrize(("base", "warned"), [(0.4, True), (0.6, False)])
def test_a_sweep_towards_small_figures_gains_by_smaller_ones(
    runs: Runs, tmp_path: Path, base: float, warned: bool
) -> None:
    runs.figure = lambda settings: 0.5
    runs.other_arms = lambda settings: [arm("base", base)]
    objective = {"arm": "stage:dpo", "metric": METRIC, "minimize": True}
    _, printed = go(runs, own(runs, tmp_path, objective=objective, search="grid", parameters=GRID))
    assert ("no trial does better than base (0.400)" in printed) == warned


def test_an_arm_that_the_settings_reach_is_not_shared_even_if_its_value_stays(runs: Runs, tmp_path: Path) -> None:
    runs.figure = lambda settings: 0.5
    runs.other_arms = lambda settings: [arm("base", 0.101), arm("stage:sft", 0.528)]
    rates = [{"key": "stages.sft.optim.lr", "values": [0.0001, 0.0002]}]
    go(runs, own(runs, tmp_path, search="grid", parameters=rates))
    assert shared_arms(runs, "mine") == [{"base": 0.101}]


def test_a_metric_of_a_stage_or_of_an_arm_alone_has_no_shared_arms(runs: Runs, tmp_path: Path) -> None:
    runs.other_arms = lambda settings: [{"name": "base", "metrics": {}}]
    assert "the same in all trials" not in go(runs)[1], "the base was not measured by this metric"
    runs.other_arms = lambda settings: [arm("base", 0.101)]
    of_stage = {"stage": "evaluate", "metric": f"{METRIC}/dpo"}
    _, printed = go(runs, own(runs, tmp_path, objective=of_stage, search="grid", parameters=GRID))
    assert "the same in all trials" not in printed
    assert shared_arms(runs, "mine") == [{}]


def test_a_trial_whose_arm_has_no_grades_fails_and_ends_no_sweep(runs: Runs, tmp_path: Path) -> None:
    runs.lost, figure = {"gradings": [{"metric": METRIC, "left_out": ["stage:dpo"]}]}, runs.figure
    runs.figure = lambda settings: None if settings["stages.dpo.beta"] == "0.3" else figure(settings)
    code, _ = go(runs, own(runs, tmp_path, search="grid", parameters=GRID))
    assert code == 0
    assert [(row["state"], row["words"]) for row in trials(runs, "mine")] == [
        ("done", ["stages.dpo.beta=0.1"]),
        ("failed", ["stages.dpo.beta=0.3"]),
    ]
    assert "too many of the grader's replies have no grade" in trials(runs, "mine")[1]["error"]


def test_a_trial_of_which_the_judge_says_nothing_fails_and_ends_no_sweep(runs: Runs, tmp_path: Path) -> None:
    pair = {"arm": "stage:dpo", "against": "stage:sft", "wins": 0, "ties": 0, "losses": 0, "invalid": 0.5}
    runs.lost, runs.figure = {"judge": {"pairs": [pair]}}, lambda settings: None
    file = own(runs, tmp_path, objective={"arm": "stage:dpo", "metric": "win_rate"}, search="grid", parameters=GRID)
    assert go(runs, file, "stages.evaluate.judge.kind=reward")[0] == 5
    assert [row["state"] for row in trials(runs, "mine")] == ["failed"] * 2
    assert "50% of the verdicts are invalid" in trials(runs, "mine")[0]["error"]


@pytest.mark.parametrize("code", [75, 130])
def test_stopped_in_a_trial_it_goes_on_with_that_one(runs: Runs, code: int) -> None:
    runs.codes[2] = code
    ended, printed = go(runs)
    assert ended == code
    assert "stopped" not in printed, "the run has said so"
    assert [settings["stages.dpo.beta"] for settings in runs.asked] == BETAS[:3]
    assert go(runs)[0] == 0
    assert [settings["stages.dpo.beta"] for settings in runs.asked[3:]] == BETAS[2:]
    assert runs.asked[3]["name"] == runs.asked[2]["name"], "its stages are found again"
    assert all(row["run"].endswith(f".{row['number']}") for row in trials(runs))
    assert [row["state"] for row in trials(runs)] == ["done"] * 4, "a stop is no failure"


def test_a_trial_whose_job_was_cancelled_is_shown_and_tried_again(runs: Runs) -> None:
    runs.faults[1] = Preempted("job 11 ended as CANCELLED with exit code 75", where="stage sft")
    code, printed = go(runs)
    assert code == 75
    assert "trial 1 was stopped: stage sft: job 11 ended as CANCELLED with exit code 75" in printed
    assert go(runs)[0] == 0
    assert [row["state"] for row in trials(runs)] == ["done"] * 4
    assert runs.asked[2]["name"] == runs.asked[1]["name"]


def test_a_trial_whose_process_was_killed_is_tried_again(runs: Runs) -> None:
    class Killed(BaseException):
        pass

    runs.faults[1] = Killed()  # type: ignore[assignment]
    with pytest.raises(Killed):
        go(runs)
    assert go(runs)[0] == 0
    assert [settings["stages.dpo.beta"] for settings in runs.asked] == [BETAS[0], *BETAS[1:2], *BETAS[1:]]


def test_a_trial_that_fails_is_listed_with_what_it_said_and_ends_no_sweep(runs: Runs, tmp_path: Path) -> None:
    runs.faults[3] = NonFiniteError("a gradient is not finite at step 4", where="stage dpo")
    code, printed = go(runs, own(runs, tmp_path))
    assert (code, len(runs.asked)) == (0, 8)
    rows = trials(runs, "mine")
    assert [row["state"] for row in rows] == [*["done"] * 7, "failed"]
    assert rows[-1]["error"] == "stage dpo: a gradient is not finite at step 4"
    assert "a gradient is not finite" in printed
    betas = [float(settings["stages.dpo.beta"]) for settings in runs.asked]
    assert all(0.01 <= beta <= 1.0 for beta in betas)
    assert len(set(betas)) == 8
    assert {settings["stages.dpo.optim.batch_size"] for settings in runs.asked} <= {"4", "8"}
    assert go(runs, own(runs, tmp_path, trials=9))[0] == 0
    assert len(runs.asked) == 9, "the study is kept"


def test_failed_trials_are_tried_again_when_they_are_asked_for(runs: Runs) -> None:
    """A server was away, for example; what has finished is not run again."""
    runs.faults[1] = StageError("the judge does not answer", where="stage evaluate")
    code, printed = go(runs)
    assert (code, len(runs.asked)) == (0, 4)
    assert "1 trial failed: --retry-failed tries again what failed" in printed
    assert go(runs)[0] == 0
    assert len(runs.asked) == 4, "not without being asked"
    code, printed = go(runs, retry_failed=True)
    assert (code, len(runs.asked)) == (0, 5)
    assert runs.asked[4] == runs.asked[1], "the same run with the same settings"
    assert [row["state"] for row in trials(runs)] == ["done"] * 4
    assert "--retry-failed" not in printed
    runs.faults[5] = StageError("again", where="stage evaluate")
    assert go(runs, retry_failed=True)[0] == 0
    assert len(runs.asked) == 5, "nothing is left that failed"


@pytest.mark.parametrize(
    "fault",
    [StoreError("cannot be reached", where="s3://models"), DiskError("no space left on the device", where="out")],
    ids=["store", "disk"],
)
def test_what_hinders_every_trial_fails_none_and_ends_the_sweep(runs: Runs, fault: AlignmentError) -> None:
    runs.faults[1] = fault
    with pytest.raises(type(fault), match=f"{fault.where}: {fault.message}"):
        go(runs)
    assert len(runs.asked) == 2
    assert go(runs)[0] == 0
    assert [row["state"] for row in trials(runs)] == ["done"] * 4
    assert [settings["stages.dpo.beta"] for settings in runs.asked[2:]] == BETAS[1:]


GATE = "stages.evaluate.gate[0]: facts of dpo less those of sft: -0.1; above 0 is required"


def test_a_trial_that_misses_a_gate_counts_and_the_gate_is_named(runs: Runs) -> None:
    runs.unmet["0.3"] = GateNotMet(GATE, remedy="stages.evaluate.gate sets the requirement")
    code, printed = go(runs)
    assert code == 0
    assert f"trial 2 does not meet a gate: {GATE}\n  → stages.evaluate.gate sets the requirement\n" in printed
    assert "best: stages.dpo.beta=0.3" in printed
    assert f"caution: trial 2 does not meet a gate: {GATE}\n" in printed
    best = trials(runs)[0]
    assert (best["number"], best["state"], best["figures"][0]["mean"]) == (2, "done", 0.9)
    assert best["error"].startswith(GATE)
    assert [row["error"] for row in trials(runs)[1:]] == [""] * 3
    assert GATE in (runs.output / "sweeps/quickstart.dpo_beta/sweep.html").read_text()
    runs.unmet["0.1"] = runs.unmet.pop("0.3")
    assert "caution: " not in go(runs, "dpo_beta", "seed=7")[1], "it is not the best trial"


def test_all_gates_that_a_trial_misses_are_named_in_a_line(runs: Runs) -> None:
    second = "stages.evaluate.gate[1]: too little"
    runs.unmet["0.3"] = GateNotMet(f"{GATE}\n  {second}", remedy="train longer\n  → use more prompts")
    _, printed = go(runs)
    assert f"caution: trial 2 does not meet a gate: {GATE}; {second}\n" in printed
    assert f"stages.dpo.beta=0.3: {GATE}; {second}" in " ".join(printed.split())


def test_a_journal_that_ends_in_half_a_line_goes_on(runs: Runs) -> None:
    """As after a disk that was full."""
    runs.codes[2] = 75
    go(runs)
    (journal,) = runs.output.rglob(JOURNAL)
    with journal.open("a") as file:
        file.write('{"op_code": 9, "worker_id": "4f')
    for _ in range(2):
        assert go(runs)[0] == 0
    assert [row["state"] for row in trials(runs)] == ["done"] * 4


def test_half_a_line_that_a_full_disk_leaves_is_cut_before_the_next(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal would otherwise hold a line that is none for good."""

    def without_room(*_: object, **__: object) -> int:
        with (runs.output / "sweeps/quickstart.dpo_beta" / JOURNAL).open("a") as journal:
            journal.write('{"op_code": 6, "worker')
        raise DiskError("no space left on the device", where="out")

    monkeypatch.setattr(module, "run_trial", without_room)
    with pytest.raises(DiskError):
        go(runs)
    monkeypatch.setattr(module, "run_trial", runs)
    assert go(runs)[0] == 0
    assert [row["state"] for row in trials(runs)] == ["done"] * 4


def test_where_every_trial_fails_the_exit_code_says_so(runs: Runs) -> None:
    runs.faults = {number: NonFiniteError("no") for number in range(4)}
    assert go(runs)[0] == 5


def test_less_may_be_better(runs: Runs, tmp_path: Path) -> None:
    changes = {"objective": {"arm": "stage:dpo", "minimize": True}, "search": "grid"}
    file = own(runs, tmp_path, **changes, parameters=[{"key": "stages.dpo.beta", "values": [0.3, 0.5, 0.9]}])
    assert "best: stages.dpo.beta=0.9" in go(runs, file)[1]


def test_a_figure_that_the_evaluation_turns_out_not_to_tell_ends_the_sweep(runs: Runs) -> None:
    runs.figure = lambda settings: None
    with pytest.raises(ConfigError, match="no stage reports style_and_facts of stage:dpo; it reports no metrics"):
        go(runs)
    assert len(runs.asked) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"arm": "stage:dop"}}, "no stage reports primary of 'stage:dop'"),
        ({"objective": {"arm": "stage:dpo", "metric": "fatcs"}}, "did you mean 'facts'"),
        (
            {"objective": {"arm": "stage:dpo", "metric": "gold"}},
            "no evaluation reports 'gold'; one of: primary, style_and_facts, style, facts, reward, greedy_log_ratio,",
        ),
        ({"parameters": []}, "at least one entry"),
        ({"parameters": [{"key": "stages.dpo.bata", "values": [0.1]}]}, "stages.dpo.bata: unknown key; did you mean"),
        ({"parameters": [{"key": "stages.dpo.beta", "values": [0.1, "x"]}]}, "stages.dpo.beta: 'x' is not allowed"),
        ({"parameters": [{"key": "stages.dpo.beta"}]}, "write values: [...], or low and high"),
        ({"parameters": [{"key": "stages.dpo.beta", "values": [0.1], "low": 0, "high": 1}]}, "write values"),
        ({"parameters": [{"key": "stages.dpo.beta", "low": 0, "high": 1, "log": True}]}, "log needs low above 0"),
        ({"search": "grid"}, "a grid needs values"),
        ({"trials": None}, "set the number of trials"),
        ({"searhc": "grid"}, "unknown key; did you mean 'search'"),
        ({"parameters": [{"key": "stages.dpo.bata", "values": [0.1]}]}, "mine.yaml: stages.dpo.bata"),
        ({"parameters": [{"key": "stages.dpo.optim.warmup_ratio", "low": 0.1, "high": 1.5}]}, "1.5 is not allowed"),
        ({"search": "grid", "trials": 3, "parameters": GRID}, "trials: a grid tries every combination; remove trials"),
        ({"parameters": [*GRID, *GRID]}, "parameters[1]: stages.dpo.beta is listed twice"),
        ({"objective": {"arm": "stage:dpo", "metric": "loss"}}, "the less loss the better; set minimize: true"),
        ({"objective": {"stage": "dpo", "metric": "perplexity"}}, "set minimize: true"),
        ({"objective": []}, "no objective; write"),
        ({"objective": {"metric": "style"}}, "write arm: … for a metric of the evaluation, or stage: …"),
        ({"objective": {"arm": "stage:dpo", "stage": "dpo"}}, "write arm: … for a metric of the evaluation, or"),
        ({"objective": {"stage": "rewrad"}}, "the recipe has no stage 'rewrad'; did you mean 'reward'"),
        ({"objective": {"stage": "reward", "metric": "eval_acuracy"}}, "did you mean 'eval_accuracy'"),
        (
            {"objective": {"stage": "reward", "metric": "eval_loss"}},
            "the less eval_loss the better; set minimize: true",
        ),
        (
            {"objective": {"stage": "evaluate", "metric": "style/dop"}},
            "reports no 'style/dop'; did you mean 'style/dpo'",
        ),
        ({"objective": {"stage": "ppo", "metric": "guard/kl", "minimize": True}}, "set stages.ppo.guard.every above 0"),
        ({"objective": {"stage": "report", "metric": "style"}}, "stage 'report' reports no metric"),
        (
            {"objective": {"stage": "dpo", "metric": "validation/loss", "minimize": True}},
            "reports no 'validation/loss' without validation; set stages.dpo.validation.every above 0",
        ),
        (
            {"pruning": {"pruner": "median", "stage": "sft", "metric": "validation/loss"}},
            "pruning.metric: stage 'sft' reports no 'validation/loss' without validation",
        ),
        ({"objective": [{"arm": "stage:dpo"}, {"arm": "stage:dop"}]}, "objective[1]: no stage reports primary of"),
        (
            {
                "parameters": [{"key": "stages.dpo.validation", "values": ["{share: 0.2, every: 2}", "{every: 0}"]}],
                "objective": {"stage": "dpo", "metric": "validation/loss", "minimize": True},
            },
            "reports no 'validation/loss' without validation; set stages.dpo.validation.every above 0",
        ),
        (
            {"parameters": [{"key": "stages.dpo.optim.batch_size", "values": [8, 100_000]}]},
            "stages.dpo.optim.warmup_ratio: the warm-up covers all optimiser steps",
        ),
        ({"pruning": {"pruner": "median", "stage": "evaluate"}}, "no stage 'evaluate' that trains; one of: sft"),
        (
            {"pruning": {"pruner": "median"}, "objective": [{"arm": "stage:dpo"}, {"arm": "stage:sft"}]},
            "trials with several objectives cannot be pruned",
        ),
    ],
)
def test_a_sweep_that_cannot_be_right_starts_nothing(
    runs: Runs, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        go(runs, own(runs, tmp_path, **changes))
    assert words in str(caught.value)
    assert runs.asked == []


@pytest.mark.parametrize(("control", "cautions"), [("fixed", 1), ("adaptive", 0)])
def test_a_sweep_of_a_setting_without_effect_is_noted(runs: Runs, tmp_path: Path, control: str, cautions: int) -> None:
    settings = [
        f"output={runs.output}",
        f"model.source=path:{runs.output / 'base'}",
        f"stages.ppo.kl.control={control}",
    ]
    horizons = [{"key": "stages.ppo.kl.horizon", "values": [100, 200]}]
    planned = module.read_sweep("quickstart", own(runs, tmp_path, search="grid", parameters=horizons), settings)
    assert sum("stages.ppo.kl.horizon" in caution for caution in planned.cautions) == cautions


def test_held_out_figures_of_a_stage_can_be_an_objective(runs: Runs, tmp_path: Path) -> None:
    settings = [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}"]
    settings += [f"stages.{stage}.validation={{share: 0.2, every: 2}}" for stage in ("reward", "dpo")]

    def read(**objective: object) -> module.Sweep:
        file = own(runs, tmp_path, objective=objective)
        return module.read_sweep("quickstart", file, settings)

    for stage, metric, minimize in (("reward", "validation/accuracy", False), ("dpo", "validation/loss", True)):
        wanted = read(stage=stage, metric=metric, minimize=minimize)
        assert str(wanted.objectives[0]) == f"{metric} of {stage}"
        assert wanted.cautions == (), "it is not measured on the training rows"
    with pytest.raises(ConfigError, match="the less validation/loss the better; set minimize: true"):
        read(stage="dpo", metric="validation/loss")


@pytest.mark.parametrize(
    ("metric", "minimize", "words"),
    [
        ("validation/last_loss", True, "stage 'dpo' reports 'validation/last_loss' only at its end; "),
        ("validation/accuracy", True, "the more validation/accuracy, the better; set pruning.minimize: false"),
        ("validation/loss", False, "the less validation/loss, the better; set pruning.minimize: true"),
        ("validation/accuracy", False, ""),
        ("validation/loss", True, ""),
    ],
)
def test_only_what_a_look_measures_prunes_and_only_in_its_direction(
    runs: Runs, tmp_path: Path, metric: str, minimize: bool, words: str
) -> None:
    settings = [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}"]
    settings += ["stages.dpo.validation={share: 0.2, every: 2}"]
    pruning = {"pruner": "median", "stage": "dpo", "metric": metric, "minimize": minimize}
    file = own(runs, tmp_path, pruning=pruning)
    if words:
        with pytest.raises(ConfigError, match=f"pruning.metric: {words}"):
            module.read_sweep("quickstart", file, settings)
    else:
        assert module.read_sweep("quickstart", file, settings).config.pruning.metric == metric


def test_sampled_answers_report_a_divergence_and_greedy_ones_a_log_ratio(runs: Runs, tmp_path: Path) -> None:
    settings = [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}"]
    sampled = "stages.evaluate.answers={per_prompt: 2, temperature: 1.0}"

    def objectives(metric: str, *more: str) -> object:
        file = own(runs, tmp_path, objective={"arm": "stage:dpo", "metric": metric, "minimize": True})
        return module.read_sweep("quickstart", file, [*settings, *more]).objectives

    assert objectives("greedy_log_ratio")
    assert objectives("kl", sampled)
    with pytest.raises(ConfigError, match=r"answers are sampled \(temperature 1\); choose another metric"):
        objectives("greedy_log_ratio", sampled)
    with pytest.raises(ConfigError, match=r"set stages\.evaluate\.answers\.temperature to 1"):
        objectives("kl")


@pytest.mark.parametrize(
    ("arm", "metric", "judge", "words"),
    [
        ("stage:dpo", "win_rate", "", "stages.evaluate.judge.kind to a judge"),
        ("stage:sft", "win_rate", "metric", "stages.evaluate.judge.pairs must compare it with"),
        ("base", "win_rate", "metric", "with stages.evaluate.reference, 'stage:sft'"),
        ("base+prompt", "greedy_log_ratio", "", "it has other prompts than stages.evaluate.reference"),
        ("base+few-shot", "greedy_log_ratio", "", "it has other prompts than stages.evaluate.reference"),
        ("stage:dpo", "win_rate", "metric", ""),
        ("stage:sft", "greedy_log_ratio", "", ""),
        ("base", "greedy_log_ratio", "", ""),
        ("base+prompt", "loss", "", ""),
    ],
)
def test_what_an_evaluation_will_never_tell_of_an_arm_is_no_objective(
    runs: Runs, tmp_path: Path, arm: str, metric: str, judge: str, words: str
) -> None:
    file = own(
        runs, tmp_path, objective={"arm": arm, "metric": metric, "minimize": metric in ("greedy_log_ratio", "loss")}
    )
    arms = "stages.evaluate.arms=[base,base+prompt,base+few-shot,'stage:sft','stage:dpo']"
    overrides = [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}", arms]
    overrides += [f"stages.evaluate.judge.kind={judge}"] if judge else []
    if not words:
        assert module.read_sweep("quickstart", file, overrides).objectives
        return
    with pytest.raises(ConfigError) as caught:
        module.read_sweep("quickstart", file, overrides)
    assert f"no stage reports the {metric} of {arm!r}; " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("metrics", "objective", "words"),
    [
        (
            "[]",
            {"arm": "stage:dpo"},
            "stages.evaluate.metrics is empty; one of: reward, greedy_log_ratio, kl, win_rate",
        ),
        ("[{name: gold, source: length, target: 9}]", {"arm": "stage:dpo"}, ""),
        ("[{name: gold, source: length, target: 9}]", {"arm": "stage:dpo", "metric": "gold"}, ""),
        (
            "[{name: far, source: length, target: 9, higher_is_better: false}]",
            {"arm": "stage:dpo"},
            "the less far the better; set minimize: true",
        ),
        (
            "[{name: far, source: length, target: 9, higher_is_better: false}]",
            {"stage": "evaluate", "metric": "far/dpo"},
            "the less far/dpo the better; set minimize: true",
        ),
    ],
)
def test_an_objective_is_a_metric_of_the_recipe_s_own(
    runs: Runs, tmp_path: Path, metrics: str, objective: dict[str, Any], words: str
) -> None:
    overrides = [
        f"output={runs.output}",
        f"model.source=path:{runs.output / 'base'}",
        f"stages.evaluate.metrics={metrics}",
    ]
    file = own(runs, tmp_path, objective=objective)
    if not words:
        assert [str(goal) for goal in module.read_sweep("quickstart", file, overrides).objectives] == [
            "gold of stage:dpo"
        ]
        return
    with pytest.raises(ConfigError) as caught:
        module.read_sweep("quickstart", file, overrides)
    assert words in str(caught.value)


def test_stages_that_measure_learn_nothing_to_prune_by(runs: Runs, tmp_path: Path) -> None:
    file = own(runs, tmp_path, pruning={"pruner": "median", "stage": "card"})
    with pytest.raises(ConfigError, match="no stage 'card' that trains; one of: sft, reward, dpo, ppo"):
        go(
            runs,
            file,
            "+stages.card={kind: reward_card, data: {source: 'bundled:quickstart/preferences'}}",
            "+stages.lost={kind: forgetting, arms: ['stage:sft']}",
        )


def test_jobs_of_slurm_have_to_be_waited_for(runs: Runs) -> None:
    with pytest.raises(ConfigError, match=r"launch\.backend\.wait: a sweep must wait for the jobs of its trials"):
        go(runs, "dpo_beta", "launch/backend=slurm", "launch.backend.wait=false")


def test_jobs_of_slurm_are_not_pruned(runs: Runs, tmp_path: Path) -> None:
    file = own(runs, tmp_path, pruning={"pruner": "median", "stage": "dpo"})
    with pytest.raises(ConfigError, match="stages are Slurm jobs cannot be pruned"):
        go(runs, file, "launch/backend=slurm")


def test_figures_that_the_check_refuses_are_not_offered(runs: Runs, tmp_path: Path) -> None:
    file = own(runs, tmp_path, objective={"arm": "stage:dpo", "metric": "win_rate"}, search="grid", parameters=GRID)
    with pytest.raises(ConfigError) as caught:
        go(runs, file, "stages.evaluate.judge.kind=metric")
    assert "no stage reports win_rate of stage:dpo; it reports style_and_facts\n" in str(caught.value)
    assert "choose another metric or set stages.evaluate.judge.kind" in str(caught.value)


def test_a_key_that_stands_twice_is_refused_with_its_line(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("parameters:\n- key: stages.dpo.beta\n  values: [0.1]\n  values: [0.3]\n")
    with pytest.raises(ConfigError, match=r"(?s)key 'values' occurs twice.*line 4"):
        go(runs, str(file))


def test_an_empty_file_is_no_sweep(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("")
    with pytest.raises(ConfigError, match=r"mine\.yaml: sweep: None is not a group of settings"):
        go(runs, str(file))


def test_an_unknown_sweep_gets_the_nearest(runs: Runs) -> None:
    with pytest.raises(ConfigError, match="no sweep 'dpo_bata'; did you mean 'dpo_beta'"):
        go(runs, "dpo_bata")


def test_two_objectives_give_the_trials_that_none_beats_in_both(runs: Runs, tmp_path: Path) -> None:
    """Beta .3 has the best score, .5 the fewest words; .1 loses to both, .05 to .1 as well."""
    runs.words = lambda settings: 30.0 - 20.0 * float(settings["stages.dpo.beta"])
    both = [{"arm": "stage:dpo"}, {"stage": "evaluate", "metric": "loss/dpo", "minimize": True}]
    grid = {"search": "grid", "parameters": [{"key": "stages.dpo.beta", "values": [float(beta) for beta in BETAS]}]}
    code, printed = go(runs, own(runs, tmp_path, objective=both, **grid))
    assert code == 0
    assert "trials 2, 3 are the Pareto set" in printed
    record = json.loads((runs.output / "sweeps/quickstart.mine/sweep.json").read_text())
    assert [goal["label"] for goal in record["goals"]] == ["style_and_facts of stage:dpo", "loss/dpo of evaluate"]
    assert record["best"] == [2, 3]
    assert [row["number"] for row in record["trials"]] == [2, 3, 1, 0]
    assert record["trials"][0]["figures"][1] == {"mean": 24.0, "low": None, "high": None}


def test_a_recipe_without_an_evaluation_is_judged_by_what_a_stage_says_of_itself(runs: Runs, tmp_path: Path) -> None:
    runs.words = lambda settings: float(settings["stages.dpo.beta"])
    file = own(
        runs, tmp_path, objective={"stage": "evaluate", "metric": "style_and_facts/dpo"}, search="grid", parameters=GRID
    )
    assert "best: stages.dpo.beta=0.3" in go(runs, file)[1]
    runs.words = lambda settings: float("nan")
    code, printed = go(runs, file, "seed=7")
    assert (code, "style_and_facts/dpo of evaluate is not a finite number" in printed) == (5, True)


def test_a_figure_of_the_training_itself_is_told_as_such(runs: Runs, tmp_path: Path) -> None:
    file = own(runs, tmp_path, objective={"stage": "dpo", "metric": "rewards/margins"}, search="grid", parameters=GRID)
    _, printed = go(runs, file)
    caution = "rewards/margins of dpo is measured on the training rows"
    assert printed.count(f"caution: {caution}") == 2, "before the first trial, and below the table"
    page = (runs.output / "sweeps/quickstart.mine/sweep.html").read_text()
    assert f"{caution[0].upper()}{caution[1:]}" in page
    held_out = own(runs, tmp_path, search="grid", parameters=GRID)
    assert "caution" not in go(runs, held_out)[1]


def test_what_is_drawn_does_not_depend_on_stops_in_between(runs: Runs, tmp_path: Path) -> None:
    def drawn(file: str, *codes: int) -> dict[str, list[str]]:
        """Each run's settings, of a study begun anew that ends so until it is done."""
        shutil.rmtree(runs.output / "sweeps", ignore_errors=True)
        runs.asked.clear()
        assert [go(runs, file)[0] for _ in codes] == list(codes)
        return {
            settings["name"]: [settings[key] for key in settings if key.startswith("stages.")]
            for settings in runs.asked
        }

    straight = drawn(own(runs, tmp_path), 0)
    assert len({beta for beta, _ in straight.values()}) == 8
    assert drawn(own(runs, tmp_path, seed=1), 0) != straight
    runs.codes = {1: 75, 5: 130}
    assert drawn(own(runs, tmp_path), 75, 130, 0) == straight
    assert len(runs.asked) == 10, "two were asked for twice"


def test_a_name_that_cannot_be_a_runs_is_refused(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "my betas.yaml"
    file.write_text(Path(own(runs, tmp_path)).read_text())
    with pytest.raises(ConfigError, match="'my betas' cannot name a sweep"):
        go(runs, str(file))


def test_names_that_become_too_long_for_later_trials_start_none(runs: Runs, tmp_path: Path) -> None:
    """A run's name has up to 64 characters, and the eighth trial's is RUN.mine.7."""
    name = f"name={'a' * 57}"
    assert go(runs, own(runs, tmp_path, trials=8), name)[0] == 0
    assert len(runs.asked[-1]["name"]) == 64
    (journal,) = runs.output.rglob(JOURNAL)
    before = journal.read_bytes()
    with pytest.raises(ConfigError, match=r"name: a trial's run would be called 'a{57}\.mine\.10' \(65 characters\); "):
        go(runs, own(runs, tmp_path, trials=11), name)
    with pytest.raises(ConfigError, match=r"\(73 characters\); .*\n  → set a shorter name=…, or give the sweep's file"):
        go(runs, own(runs, tmp_path, trials=8), name, "seed=7")
    assert len(runs.asked) == 8
    assert journal.read_bytes() == before, "a sweep that is refused leaves no study"


SHIPPED = sorted(path.stem for path in (conf_folder() / "sweep").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_sweep_fits_the_quickstart(runs: Runs, name: str) -> None:
    module.read_sweep("quickstart", name, [f"output={runs.output}", f"model.source=path:{runs.output / 'base'}"])
