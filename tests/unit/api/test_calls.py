"""The verbs as functions do what the commands do, also in threads, in notebooks and beside the caller's own Hydra."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

import alignment
from alignment import cli
from alignment.pipeline.execute import estimates
from alignment.pipeline.plan.plan import make_plan
from tests.unit.pipeline.sweeps.conftest import BETAS, METRIC, Runs

ROOT = Path(__file__).parents[3]
STAGES = ["sft", "evaluate_sft", "reward", "dpo", "ppo", "evaluate", "report"]
Captured = pytest.CaptureFixture[str]


def test_a_plan_says_what_the_command_prints(overrides: list[str], capsys: Captured) -> None:
    planned = alignment.plan("quickstart", [*overrides, "stages.dpo.beta=0.3"])
    assert list(planned.stages) == STAGES
    assert {stage.action for stage in planned.stages.values()} == {alignment.Action.run}
    assert planned.stages["dpo"].settings["beta"] == 0.3
    assert planned.stages["ppo"].inputs["reward"] == "stage:reward"
    assert planned.folder.name == "quickstart"
    assert not planned.folder.exists()
    assert capsys.readouterr().out == ""
    assert cli.main(["plan", "quickstart", *overrides, "stages.dpo.beta=0.3"]) == 0
    printed = capsys.readouterr().out
    for stage in planned.stages.values():
        steps = "" if stage.steps is None else rf"\s{stage.steps}"
        assert re.search(rf"\b{stage.name} .*{steps}\s+run\s+{stage.reason}", printed)
    for note in planned.notes:
        assert f"note: {note}" in printed
    assert "7 to run, 0 reused" in printed
    assert repr(planned).splitlines()[0] == "RunPlan quickstart: 7 to run, 0 reused"
    assert cli.main(["plan", "quickstart", "--json", *overrides, "stages.dpo.beta=0.3"]) == 0
    as_json = json.loads(capsys.readouterr().out)
    assert [
        (stage["name"], stage["rows"], stage["steps"], stage["inputs"]) for stage in as_json["stages"].values()
    ] == [(stage.name, stage.rows, stage.steps, stage.inputs) for stage in planned.stages.values()]
    assert as_json["settings"]["stages"]["dpo"]["beta"] == 0.3
    assert cli.main(["plan", "quickstart", "--json", "--scripts", "jobs", *overrides]) == 2


@pytest.mark.parametrize(
    ("override", "error", "code"),
    [("stages.dpo.bta=0.3", alignment.ConfigError, 2), ("model.source=path:nowhere", alignment.ModelError, 4)],
)
@pytest.mark.parametrize("call", [alignment.plan, alignment.run])
def test_an_error_is_that_of_the_command(
    call: Callable[..., object],
    override: str,
    error: type[alignment.AlignmentError],
    code: int,
    overrides: list[str],
    capsys: Captured,
) -> None:
    with pytest.raises(error) as caught:
        call("quickstart", [*overrides, override])
    assert caught.value.exit_code == code
    assert cli.main(["plan", "quickstart", *overrides, override]) == code
    assert capsys.readouterr().err == f"{caught.value.labelled}\n"


@pytest.mark.usefixtures("without_training")
def test_a_run_comes_back_and_is_reused(
    overrides: list[str], run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """It prints plain lines where standard output is then no terminal, also in Jupyter, which asks for colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        run = alignment.run("quickstart", overrides)
    assert (run.folder, run.state, run.name) == (run_folder, "done", "quickstart")
    assert {stage.state for stage in run.stages.values()} == {"done"}
    assert run.stages["dpo"].steps() == [{"step": 1, "seconds": 0.1, "loss": 1.5}]
    assert "dpo: done" in screen.getvalue()
    assert "\x1b" not in screen.getvalue()
    assert [stage.name for stage in alignment.plan("quickstart", overrides).to_run] == []
    again = alignment.run("quickstart", overrides, quiet=True)
    assert {stage.state for stage in again.stages.values()} == {"reused"}
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("without_training")
def test_one_stage_runs_alone(overrides: list[str]) -> None:
    run = alignment.run("quickstart", overrides, stage="sft", quiet=True)
    assert [name for name, stage in run.stages.items() if stage.artifact is not None] == ["sft"]
    assert (run.state, run.stages["dpo"].state, run.stages["dpo"].steps()) == ("waiting", "waiting", [])
    with pytest.raises(alignment.ConfigError, match="no stage 'dop'") as caught:
        alignment.run("quickstart", overrides, stage="dop", quiet=True)
    assert caught.value.where == "stage", "the argument, and not the command's option"
    with pytest.raises(alignment.ConfigError, match="no sweep of this name") as caught:
        alignment.sweep("quickstart", "nope", overrides)
    assert caught.value.where == "nope"


@pytest.mark.usefixtures("without_training")
@pytest.mark.parametrize(
    ("fault", "error", "state"),
    [("dpo:fail", alignment.NonFiniteError, "failed"), ("dpo:preempt", alignment.Preempted, "preempted")],
)
def test_a_stage_that_does_not_end_well_raises_and_the_run_can_be_read(
    fault: str,
    error: type[alignment.AlignmentError],
    state: str,
    overrides: list[str],
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORKER_FAULT", fault)
    with pytest.raises(error):
        alignment.run("quickstart", overrides, quiet=True)
    run = alignment.load_run(run_folder)
    assert run.state == state
    assert run.stages["sft"].artifact is not None
    assert run.stages["dpo"].artifact is None
    assert run.stages["dpo"].error


@pytest.mark.usefixtures("without_training")
def test_ctrl_c_lets_the_stage_save_and_raises(
    overrides: list[str], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_FAULT", "sft:hang")
    before = signal.getsignal(signal.SIGTERM)
    ended = threading.Event()

    def interrupt() -> None:
        while not (run_folder / "sft/hanging").exists():
            if ended.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            alignment.run("quickstart", overrides, quiet=True)
    finally:
        ended.set()
        thread.join()
    assert alignment.load_run(run_folder).state == "interrupted"
    assert '"preempted"' in (run_folder / "sft/status.json").read_text(), "it was asked to stop, and did"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("without_training")
def test_a_run_in_a_thread_leaves_signals_alone(overrides: list[str]) -> None:
    handled = []
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.append(signal.SIGUSR1))
    try:
        with ThreadPoolExecutor() as pool:
            future = pool.submit(alignment.run, "quickstart", overrides, stage="sft", quiet=True)
            signal.raise_signal(signal.SIGUSR1)
            assert future.result(timeout=120).stages["sft"].state == "done"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]


def test_threads_plan_at_the_same_time(overrides: list[str], tmp_path: Path) -> None:
    """Each recipe is a file of its own, so that none of them is composed already."""
    recipes = []
    for number in range(4):
        recipes.append(tmp_path / f"mine_{number}.yaml")
        recipes[-1].write_text(f"defaults: [quickstart, _self_]\nseed: {number}\n")
    with ThreadPoolExecutor(len(recipes)) as pool:
        plans = list(pool.map(lambda recipe: alignment.plan(recipe, overrides), recipes))
    assert [planned.settings["seed"] for planned in plans] == [0, 1, 2, 3]


def test_a_program_that_uses_hydra_itself_finds_its_state_again(overrides: list[str], tmp_path: Path) -> None:
    """Its files may do what those of a recipe may not, such as choose a file by the environment."""
    own = tmp_path / "own"
    (own / "db").mkdir(parents=True)
    (own / "config.yaml").write_text("defaults: [{db: '${oc.env:WHICH,small}'}, _self_]\nname: mine\n")
    (own / "db/small.yaml").write_text("size: 3\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [quickstart, _self_]\n")
    with hydra.initialize_config_dir(str(own), version_base="1.2"):
        loader = GlobalHydra.instance().config_loader()
        assert list(alignment.plan(recipe, overrides).stages) == STAGES
        assert GlobalHydra.instance().config_loader() is loader
        assert str(hydra.version.getbase()) == "1.2"
        assert hydra.compose("config") == {"db": {"size": 3}, "name": "mine"}
    with hydra.initialize_config_dir(str(own), version_base="1.2"):
        assert hydra.compose("config") == {"db": {"size": 3}, "name": "mine"}
    assert not GlobalHydra.instance().is_initialized()


def test_a_plan_has_the_cost_that_was_estimated_before(overrides: list[str]) -> None:
    assert alignment.plan("quickstart", overrides).cost is None
    plan = make_plan("quickstart", overrides)
    cost = alignment.StageCost(stage="dpo", kind="dpo", phases={"training": alignment.PhaseCost(peak=5, seconds=3.0)})
    (dpo,) = [stage for stage in plan.stages if stage.name == "dpo"]
    file = estimates._file(plan, dpo, "this")
    file.parent.mkdir(parents=True)
    alignment.RunCost(device="this", stages=[cost]).write(file)
    planned = alignment.plan("quickstart", overrides)
    assert [stage for stage in planned.cost.stages if not stage.error] == [cost]
    with pytest.raises(alignment.ConfigError, match="no device 'abacus'"):
        alignment.plan("quickstart", overrides, cost=True, device="abacus")


def test_a_device_asks_for_the_cost_as_it_does_on_the_command_line(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [alignment.StageCost(stage="dpo", kind="dpo", phases={"training": alignment.PhaseCost(peak=5)})]
    calls: list[tuple[str, bool]] = []

    def estimated(_: object, *, device: str, trade: bool, announce: object) -> alignment.RunCost:
        calls.append((device, trade))
        return alignment.RunCost(device=device, stages=stages)

    monkeypatch.setattr(estimates, "estimated", estimated)
    cost = alignment.plan("quickstart", overrides, device="h100").cost
    assert (cost.device, cost.stages) == ("h100", stages)
    assert cli.main(["plan", "quickstart", *overrides, "--device", "h100"]) == 0
    assert alignment.plan("quickstart", overrides).cost is None
    assert calls == [("h100", False)] * 2


@pytest.mark.usefixtures("without_training")
def test_a_plan_and_a_run_without_a_report_say_how_to_get_one(overrides: list[str], capsys: Captured) -> None:
    advice = "no stage writes a report; to get one, add `report: {kind: report}` to stages"
    without = [*overrides, "~stages.report"]
    assert [note for note in alignment.plan("quickstart", without).notes if "report" in note] == [advice]
    alignment.run("quickstart", without)
    assert capsys.readouterr().out.count(f"note: {advice}\n") == 1
    alignment.run("quickstart", without, stage="sft")
    assert advice not in capsys.readouterr().out


@pytest.mark.usefixtures("without_training")
def test_the_examples_in_the_docs_run(
    overrides: list[str], run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """With a model and data of the test, and in its folder."""
    own = dict(override.split("=", 1) for override in overrides)
    for name in ("plan", "run"):
        call = getattr(alignment, name)
        monkeypatch.setattr(alignment, name, lambda recipe, more, call=call: call(recipe, {**own, **more}))
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    exec("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    printed = capsys.readouterr().out
    assert printed.startswith("RunPlan quickstart: 7 to run, 0 reused\n  sft: run (")
    assert "done 1.0\n" in printed
    assert "sft Interval(mean=0.5, low=0.4, high=0.6)\n" in printed
    assert "stage:dpo stage:sft Interval(mean=0.08, low=0.02, high=0.14) better\n" in printed


def test_overrides_may_be_a_mapping_and_are_not_one_text(overrides: list[str]) -> None:
    pairs = dict(override.split("=", 1) for override in overrides)
    planned = alignment.plan("quickstart", {**pairs, "adapter": "full", "stages.dpo.beta": 0.3})
    assert planned.stages["dpo"].settings["beta"] == 0.3
    assert planned.stages["sft"].settings["adapter"]["kind"] == "full"
    with pytest.raises(alignment.ConfigError, match=r"give a list \['seed=1'\]"):
        alignment.plan("quickstart", "seed=1")


@pytest.mark.parametrize("call", [alignment.plan, alignment.run], ids=["plan", "run"])
@pytest.mark.parametrize("recipe", [{"stages": {"sft": {"kind": "sft"}}}, None], ids=repr)
def test_a_recipe_is_a_name_or_a_path(call: Any, recipe: Any) -> None:
    with pytest.raises(TypeError, match=rf"recipe is a {type(recipe).__name__}; .* path of a \.yaml file"):
        call(recipe)


def test_a_folder_that_is_gone_is_a_fault_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(alignment.ConfigError, match="the current folder no longer exists"):
        alignment.plan("quickstart")


def test_a_sweep_comes_back_with_its_trials(runs: Runs, tmp_path: Path) -> None:
    overrides = {"output": runs.output, "model.source": f"path:{runs.output / 'base'}"}
    swept = alignment.sweep("quickstart", "dpo_beta", overrides, quiet=True)
    assert [trial.settings["stages.dpo.beta"] for trial in swept.best] == ["0.3"]
    assert sorted(trial.settings["stages.dpo.beta"] for trial in swept.trials) == sorted(BETAS)
    evaluation = swept.run(swept.best[0].number).evaluation
    assert evaluation.arms[0].metrics[METRIC].mean == pytest.approx(0.9)
    table = swept.frame()
    assert table["stages.dpo.beta"].iloc[0] == "0.3"
    label = f"{METRIC} of stage:dpo"
    assert table[[label, f"{label} low", f"{label} high"]].iloc[0].tolist() == pytest.approx([0.9, 0.85, 0.95])
    assert alignment.load_sweep(tmp_path / "sweeps/quickstart.dpo_beta") == swept
    with pytest.raises(alignment.ArtifactError, match="no trial 9"):
        swept.run(9)


def test_a_sweep_without_a_finished_trial_is_an_error(runs: Runs) -> None:
    runs.faults = dict.fromkeys(range(4), alignment.StageError("lost"))
    overrides = {"output": runs.output, "model.source": f"path:{runs.output / 'base'}"}
    with pytest.raises(alignment.StageError, match="no trial has finished"):
        alignment.sweep("quickstart", "dpo_beta", overrides, quiet=True)
    failed = alignment.load_sweep(runs.output / "sweeps/quickstart.dpo_beta")
    assert [trial.error for trial in failed.trials] == ["lost"] * 4
    assert failed.best == []
    assert failed.frame()["state"].tolist() == ["failed"] * 4
