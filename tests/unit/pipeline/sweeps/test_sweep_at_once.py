"""Sweeps whose trials are processes of their own: who runs when, what a stop leaves, which ones are pruned."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from alignment.config.launch import LaunchConfig, MachinesBackend, SlurmBackend
from alignment.core.errors import ConfigError, GateNotMet
from alignment.core.hardware import VISIBLE
from alignment.core.locks import held
from alignment.pipeline.sweeps import run as module
from alignment.pipeline.sweeps import trials as shared
from alignment.pipeline.sweeps.study import LatestMedian
from alignment.pipeline.sweeps.trials import Running, Share, shares
from alignment.records.sweep_record import TrialOutcome
from tests.living import descendants_of, wait_until, words_of
from tests.unit.pipeline.sweeps.conftest import BETAS, Runs, go, own, trials

STEPS = 4


class Processes:
    """In place of trials' processes: each takes a step whenever it is looked at, and is done after ``STEPS`` of them.

    A step writes a line of the DPO stage's metrics.jsonl, whose loss is ``losses`` by beta: at each step, or at all.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.alive: list[str] = []
        self.seen: list[tuple[str, ...]] = []
        self.shares: dict[str, Share] = {}
        self.losses: dict[str, float | list[float]] = {}
        self.outcomes: dict[str, TrialOutcome] = {}
        self.interrupt_at: int | None = None
        self.waits: list[float] = []

    def start(self, run_folder: Path, argv: Sequence[str], *, log: Path, share: Share) -> Process:
        self.shares[run_folder.name] = share
        return Process(self, run_folder, argv)


class Process:
    def __init__(self, all_of_them: Processes, run_folder: Path, argv: Sequence[str]) -> None:
        self.all = all_of_them
        self.folder = run_folder
        self.argv = argv
        self.beta = next(word.split("=")[1] for word in argv if word.startswith("stages.dpo.beta="))
        self.steps = 0
        self.asked = False
        self.all.alive.append(self.beta)
        artifact = str(self.folder / "dpo")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "run.json").write_text(
            json.dumps({"stages": {"dpo": {"state": "running", "artifact": artifact}}})
        )
        self.curve = self.folder / "dpo.work/content/metrics.jsonl"
        self.curve.parent.mkdir(parents=True, exist_ok=True)
        self.curve.write_text("")

    def stage(self) -> str:
        return "dpo"

    def ended(self) -> TrialOutcome | None:
        self.all.seen.append(tuple(self.all.alive))
        if len(self.all.seen) == self.all.interrupt_at:
            raise KeyboardInterrupt
        if self.asked:
            return TrialOutcome(code=75)
        if self.steps < STEPS:
            self.steps += 1
            losses = self.all.losses.get(self.beta, 1.0)
            loss = losses[self.steps - 1] if isinstance(losses, list) else losses
            line = {"step": self.steps, "loss": loss, "seconds": 1.0}
            if self.steps % 2 == 0 and "stages.dpo.validation={share: 0.2, every: 2}" in self.argv:
                line["validation/loss"] = loss
            with self.curve.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            return None
        if (outcome := self.all.outcomes.get(self.beta)) is not None:
            return outcome
        outcome = TrialOutcome(code=0)
        try:
            self.all.runs(self.argv[0], self.argv[1:], console=None, wait=True)  # type: ignore[arg-type]
        except GateNotMet as unmet:
            outcome = TrialOutcome(code=10, error=str(unmet))
        record = json.loads((self.folder / "run.json").read_text())
        record["stages"]["dpo"] = {"kind": "dpo", "state": "done", "artifact": str(self.folder / "dpo")}
        (self.folder / "run.json").write_text(json.dumps(record))
        return outcome

    def ask_to_stop(self) -> None:
        self.asked = True

    def wait(self, seconds: float) -> None:
        assert self.asked
        self.all.waits.append(seconds)

    def close(self) -> None:
        self.all.alive.remove(self.beta)


@pytest.fixture
def processes(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Processes:
    fake = Processes(runs)
    monkeypatch.setattr(module, "Running", fake.start)
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    return fake


def test_as_many_trials_run_at_once_as_are_asked_for(processes: Processes, runs: Runs) -> None:
    code, printed = go(runs, at_once=2)
    assert (code, sorted(settings["stages.dpo.beta"] for settings in runs.asked)) == (0, BETAS)
    assert {len(together) for together in processes.seen} <= {1, 2}
    assert ("0.05", "0.1") in processes.seen
    assert ("best: stages.dpo.beta=0.3" in printed, "trial 2: dpo" in printed) == (True, True)
    assert processes.alive == []


def test_interrupted_it_stops_all_and_goes_on_with_those(processes: Processes, runs: Runs) -> None:
    processes.interrupt_at = 3
    code, printed = go(runs, "dpo_beta", "launch.grace_seconds=500", at_once=2)
    assert (code, runs.asked, processes.alive, printed.count("stopped")) == (130, [], [], 1)
    assert len(processes.waits) == 2
    assert all(500 < seconds <= 500 + shared._SAVED_LATE_SECONDS for seconds in processes.waits)
    assert go(runs, "dpo_beta", "launch.grace_seconds=500", at_once=2)[0] == 0
    assert sorted(settings["stages.dpo.beta"] for settings in runs.asked) == BETAS
    assert {row["number"] for row in trials(runs)} == {0, 1, 2, 3}


def test_jobs_that_a_sweep_no_longer_waits_for_are_named(processes: Processes, runs: Runs) -> None:
    """Each process that it ends only followed the jobs of its trial."""
    for number, job in enumerate(("3", "4")):
        folder = runs.output / f"runs/quickstart.dpo_beta.{number}"
        folder.mkdir(parents=True)
        (folder / "jobs.json").write_text(json.dumps({"sft": job}))
    processes.outcomes["0.05"] = TrialOutcome(code=75, error="stage sft: job 3 ended as CANCELLED with exit code 0")
    code, printed = go(runs, "dpo_beta", "launch/backend=slurm", at_once=2)
    assert code == 75
    assert "trial 0 was stopped: stage sft: job 3 ended as CANCELLED" in printed
    assert (
        "jobs continue in Slurm: quickstart.dpo_beta.1; `align status` shows them; "
        "run the same command once they have ended\n"
    ) in printed
    processes.outcomes.clear()
    assert go(runs, "dpo_beta", "launch/backend=slurm", at_once=2)[0] == 0
    assert len(trials(runs)) == 4


def median(runs: Runs, tmp_path: Path, **more: Any) -> str:
    pruning = {"pruner": "median", "stage": "dpo", "startup_trials": 2, **more}
    parameters = [{"key": "stages.dpo.beta", "values": [0.1, 0.3, 0.5]}]
    return own(runs, tmp_path, search="grid", trials=None, parameters=parameters, pruning=pruning)


START = math.log(2)
"""DPO's first loss whatever its settings; batches of trials that do well may lie above it."""
USUAL = [START, 0.72, 0.70, 0.71]


@pytest.mark.parametrize(
    ("losses", "pruning", "pruned_at"),
    [
        ({"0.5": 3.0}, {"warmup_steps": 2}, 2),
        ({"0.1": USUAL, "0.3": USUAL, "0.5": [START, 1.9, 2.5, 3.1]}, {}, 2),
        # A rate that warms up leaves the first losses where they began, but for rounding.
        ({"0.1": [START] * 4, "0.3": [START] * 4, "0.5": [START + 1e-4, START + 1e-4, START, START]}, {}, None),
        ({"0.5": [1.0, 1.0, 1.0, 3.0]}, {"metric": "validation/loss"}, 4),
    ],
)
def test_a_trial_whose_curve_is_hopeless_is_pruned_and_listed_with_its_step(
    processes: Processes, runs: Runs, tmp_path: Path, losses: dict[str, Any], pruning: Any, pruned_at: int | None
) -> None:
    processes.losses = losses
    file, looks = median(runs, tmp_path, **pruning), "stages.dpo.validation={share: 0.2, every: 2}"
    code, printed = go(runs, file, looks)
    assert (code, len(runs.asked)) == (0, 3 if pruned_at is None else 2)
    assert ("pruned" in printed) == (f"trial 2 pruned at step {pruned_at}" in printed) == (pruned_at is not None)
    if pruned_at is not None:
        last = trials(runs, "mine")[-1]
        assert (last["state"], last["error"].endswith(f"at step {pruned_at}")) == ("pruned", True)
    assert go(runs, file, looks)[0] == 0
    assert len(runs.asked) == (3 if pruned_at is None else 2), "it is not tried again"


def pruned(curve: list[float], *, direction: str, sign: int) -> bool:
    study = optuna.create_study(direction=direction)
    for _ in range(3):
        values = {step: sign * value for step, value in enumerate(GOOD, start=1)}
        study.add_trial(optuna.trial.create_trial(value=0.0, intermediate_values=values))
    study.pruner = LatestMedian(startup_trials=2, warmup_steps=0)
    trial = study.ask()
    for step, value in enumerate(curve, start=1):
        trial.report(sign * value, step)
    return trial.should_prune()


GOOD = [0.7, 0.6, 0.5, 0.4, 0.4, 0.4]


@pytest.mark.parametrize(
    ("curve", "is_pruned"),
    [
        ([0.7, 0.6, 0.5, 0.4, 0.4, 0.5], True),  # a little worse on the whole
        ([0.7, 0.6, 0.5, 0.3, 0.3, 0.5], False),  # one bad batch at the end of better ones
        ([0.1, 0.9, 0.9, 0.9, 0.9, 0.9], True),  # its best is long ago
        (GOOD, False),
        ([*GOOD, 9.0], False),  # no finished trial has come so far
    ],
)
def test_a_trial_is_pruned_where_it_stands_worse_than_the_median(curve: list[float], *, is_pruned: bool) -> None:
    for direction, sign in (("minimize", 1), ("maximize", -1)):
        assert pruned(curve, direction=direction, sign=sign) is is_pruned


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def of(cores: int, devices: Sequence[str]) -> None:
        monkeypatch.setattr(shared.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        monkeypatch.setattr(shared.hardware, "visible_devices", lambda: list(devices))

    return of


def test_the_machine_is_shared_out_in_equal_parts(machine: Any) -> None:
    machine(5, [])
    assert [sorted(share.cores) for share in shares(2, LaunchConfig())] == [[0, 1], [2, 3]]
    assert shares(1, LaunchConfig())[0].devices is None
    machine(2, ["4", "5", "6", "7"])
    parts = shares(2, LaunchConfig(num_processes=2))
    assert [share.devices for share in parts] == [("4", "5"), ("6", "7")]
    assert [sorted(share.cores) for share in shares(3, LaunchConfig())] == [[0], [1], [0]]
    jobs = LaunchConfig(backend=SlurmBackend())
    assert [share.devices for share in shares(8, jobs)] == [None] * 8, "jobs have their own"


@pytest.mark.parametrize(
    ("number", "launch", "words"),
    [
        (0, LaunchConfig(), "1 or more"),
        (3, LaunchConfig(), "3 trials of 1 processes, but this machine has 2 GPUs"),
        (2, LaunchConfig(num_processes=2), "--at-once 1"),
        (2, LaunchConfig(backend=MachinesBackend()), "several machines"),
    ],
)
def test_what_cannot_be_shared_is_refused(machine: Any, number: int, launch: LaunchConfig, words: str) -> None:
    machine(4, ["0", "1"])
    with pytest.raises(ConfigError) as caught:
        shares(number, launch)
    assert words in str(caught.value)


ALL = Share(cores=frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset())


def started(tmp_path: Path, *argv: str, share: Share = ALL) -> Running:
    return Running(tmp_path / "runs/one", argv, log=tmp_path / "trial-0.log", share=share)


def ended(trial: Running) -> TrialOutcome:
    trial.wait(60)
    outcome = trial.ended()
    trial.close()
    assert outcome is not None
    return outcome


def trial_process() -> psutil.Process:
    def trials() -> list[psutil.Process]:
        return [child for child in descendants_of(os.getpid()) if "alignment.pipeline.sweeps.trial" in words_of(child)]

    wait_until(trials)
    (process,) = trials()
    return process


def test_what_it_said_of_its_fault_is_known(tmp_path: Path) -> None:
    trial = started(tmp_path, "quickstrat")
    outcome = ended(trial)
    assert (outcome.code, "did you mean 'quickstart'" in outcome.error) == (2, True)
    assert outcome.error in (tmp_path / "trial-0.log").read_text()
    assert trial.stage() == ""


@pytest.mark.skipif(not ALL.cores, reason="this system cannot bind a process to cores")
def test_it_gets_its_share_and_ends_when_the_sweep_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VISIBLE[-1], "GPU-7,GPU-8,GPU-9")
    core = min(ALL.cores)
    share = Share(cores=frozenset({core}), devices=("GPU-7", "GPU-9"))
    with held(tmp_path / "runs/quickstart/lock", wait=False):  # which it waits for, as long as the sweep is there
        trial = started(tmp_path, "quickstart", f"output={tmp_path}", share=share)
        process = trial_process()
        assert process.cpu_affinity() == [core]
        variables = {name: process.environ().get(name) for name in VISIBLE}
        assert variables == dict.fromkeys(VISIBLE) | {VISIBLE[-1]: "GPU-7,GPU-9"}
        trial.close()
        trial.wait(60)
    outcome = trial.ended()
    assert outcome is not None
    assert "by signal 15" in outcome.error


def test_a_metric_that_the_stage_does_not_show_ends_the_sweep(processes: Processes, runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not log 'los' while it trains; did you mean 'loss'"):
        go(runs, median(runs, tmp_path, metric="los"))
    assert (runs.asked, len(processes.seen)) == ([], 1)


def test_an_outcome_that_cannot_be_written_fails_no_trial(tmp_path: Path) -> None:
    """Whatever the trial ended with; here, its file cannot replace a folder."""
    trial = started(tmp_path, "quickstrat")
    (tmp_path / "trial-0.json").mkdir()
    trial.wait(60)
    (tmp_path / "trial-0.json").rmdir()
    outcome = trial.ended()
    trial.close()
    assert outcome is not None
    assert (outcome.code, "did you mean 'quickstart'" in outcome.error) == (12, True)
