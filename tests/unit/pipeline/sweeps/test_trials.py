"""A trial as a real process: how it ended is known, and it ends when the sweep that started it is gone."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil
import pytest

from alignment.core.hardware import VISIBLE
from alignment.core.locks import held
from alignment.pipeline.sweeps.trials import Running, Share
from alignment.records.sweep_record import TrialOutcome
from tests.living import descendants_of, words_of
from tests.patience import wait_until

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
    """The process of the one trial that was started, once it runs its own program."""

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


def test_one_that_was_killed_is_told_from_one_that_failed(tmp_path: Path) -> None:
    trial = started(tmp_path, "quickstart", f"output={tmp_path}")
    trial_process().kill()
    assert ended(trial) == TrialOutcome(code=1, error="its process ended by signal 9 without recording an outcome")


def test_a_disk_on_which_it_can_write_nothing_is_told_from_a_fault_of_its_own(tmp_path: Path) -> None:
    """The kernel refuses whatever makes a file longer than a few bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "trial-0.log").write_text("an earlier attempt\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        trial = started(tmp_path, "quickstart", f"output={tmp_path / 'out'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    outcome = ended(trial)
    assert (outcome.code, outcome.error.startswith("run one: its files cannot be written")) == (12, True)


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


@pytest.mark.skipif(not ALL.cores, reason="this system cannot bind a process to cores")
@pytest.mark.parametrize("variable", VISIBLE)
def test_it_gets_its_share_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "GPU-7,GPU-8,GPU-9")
    core = min(ALL.cores)
    share = Share(cores=frozenset({core}), devices=("GPU-7", "GPU-9"))
    with held(tmp_path / "runs/quickstart/lock", wait=False):  # which it waits for, as long as the sweep is there
        trial = started(tmp_path, "quickstart", f"output={tmp_path}", share=share)
        process = trial_process()
        assert process.cpu_affinity() == [core]
        assert {name: process.environ().get(name) for name in VISIBLE} == dict.fromkeys(VISIBLE) | {
            variable: "GPU-7,GPU-9"
        }
        trial.close()
        trial.wait(60)


def test_it_ends_when_the_sweep_lets_go_of_it(tmp_path: Path) -> None:
    with held(tmp_path / "runs/quickstart/lock", wait=False):  # which it waits for, as long as the sweep is there
        trial = started(tmp_path, "quickstart", f"output={tmp_path}")
        trial.close()
        trial.wait(60)
    outcome = trial.ended()
    assert outcome is not None
    assert "by signal 15" in outcome.error
