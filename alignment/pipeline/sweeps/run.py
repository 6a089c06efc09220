"""Runs a recipe many times with different settings: each trial is a separate run, judged by its result.

Stages that a setting does not affect are made once, because results are reused by their fingerprints. The study is a
journal of lines beside the trials; a stopped sweep continues with the missing trials (docs/design/0012).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.config.sweep import Pruner
from alignment.core.errors import PREEMPTED, AlignmentError, Busy, ConfigError, DiskError, StoreError
from alignment.core.locks import held
from alignment.core.wording import counted
from alignment.pipeline.backends import slurm_jobs
from alignment.pipeline.execute.display import announcer
from alignment.pipeline.execute.run import run_trial
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, termination_raises
from alignment.pipeline.execute.stored_results import fetch_missing, not_reused
from alignment.pipeline.sweeps import results
from alignment.pipeline.sweeps.study import Study, number_of, refuse_what_cannot_begin
from alignment.pipeline.sweeps.sweep_file import Sweep, read_sweep
from alignment.pipeline.sweeps.trials import Curve, Running, Share, shares, stop_all
from alignment.records.sweep_record import TrialOutcome

_POLL_SECONDS = 0.5


def sweep(
    recipe: str,
    name: str,
    overrides: Sequence[str],
    *,
    console: Console,
    at_once: int = 1,
    retry_failed: bool = False,
) -> int:
    """Reads a sweep and runs its missing trials (``run_sweep``); returns the exit code. Raises ConfigError: as
    ``read_sweep`` and ``run_sweep``; ModelError, DataError, Busy, StoreError, DiskError: as ``run_sweep``."""
    wanted = read_sweep(recipe, name, overrides)
    return run_sweep(wanted, console=console, at_once=at_once, retry_failed=retry_failed)


def run_sweep(wanted: Sweep, *, console: Console, at_once: int = 1, retry_failed: bool = False) -> int:
    """Runs the missing trials, and those that failed if ``retry_failed``; returns the exit code, 0 if any trial has
    ever finished. Raises ConfigError: the sweep does not fit the machine, no stage reports its objective, or optuna is
    not installed; ModelError, DataError: something cannot be fetched, and no trial has begun; Busy, StoreError,
    DiskError: other processes, the store or the disk hinder a trial, which the next call tries again."""
    shares_of_machine = shares(at_once, wanted.launch)
    refuse_what_cannot_begin(wanted)
    with held(wanted.folder / "lock", wait=False):
        wanted = _with_sources(wanted, console)
        study = Study(wanted)
        study.retry_cut_off()
        if retry_failed:
            study.retry_failed()
        console.print(f"{wanted.name}: {wanted.number} trials of {wanted.run_name}", highlight=False)
        for caution in wanted.cautions:
            _print(console, "caution: ", caution)
        apart = at_once > 1 or wanted.config.pruning.pruner is not Pruner.none
        code = _in_parallel(study, wanted, shares_of_machine, console) if apart else _in_turn(study, wanted, console)
        if code:
            return code
        results.show(console, results.write(study, wanted), wanted)
        if failed := len(study.failed()):
            _print(console, f"{counted(failed, 'trial')} failed: ", "--retry-failed tries again what failed")
        return 0 if study.completed() else 5


def _with_sources(wanted: Sweep, console: Console) -> Sweep:
    """The sweep with all models and data of its trials on this machine. If a trial fetched them, a hub that is away
    would fail that trial for good. A download also pins them to a commit, and with it the sweep's identity, so the
    sweep is read again."""
    needed = [(plan, not_reused(plan.stages)) for plan in wanted.plans]
    if not fetch_missing(needed, announcer(console)):
        return wanted
    return read_sweep(wanted.recipe, str(wanted.file), wanted.overrides)


def _in_turn(study: Study, wanted: Sweep, console: Console) -> int:
    while (trial := study.next()) is not None:
        _print(console, f"[bold]trial {number_of(trial)}[/]  ", " ".join(results.words(trial.params)))
        try:
            outcome = TrialOutcome(code=run_trial(wanted.recipe, _overrides(wanted, trial), console=console, wait=True))
        except AlignmentError as error:
            outcome = TrialOutcome(code=error.exit_code, error=str(error))
        if code := _settle(study, trial, wanted, outcome, console):
            return code
    return 0


def _overrides(wanted: Sweep, trial: Any) -> list[str]:
    group = f"tracking.group={wanted.run_name}.{wanted.name}"
    return [group, *wanted.overrides, *results.words(trial.params), f"name={trial.user_attrs['run']}"]


def _settle(study: Study, trial: Any, wanted: Sweep, outcome: TrialOutcome, console: Console) -> int:
    """Records how a trial ended; returns the exit code of a stop, or 0. Raises what would end the others alike."""
    if outcome.code in (INTERRUPTED, PREEMPTED):
        study.again(trial)  # its finished stages will be reused
        if outcome.error:  # a job of Slurm was stopped; a run that is stopped here says so itself
            _print(console, f"trial {number_of(trial)} was stopped: ", outcome.error)
        return outcome.code
    # The trial's settings are not at fault, so all that follow would end alike.
    for error_class in (Busy, StoreError, DiskError):
        if outcome.code == error_class.exit_code:
            study.again(trial)
            raise error_class(outcome.error)
    error = _complete(study, trial, wanted, outcome, console) if outcome.is_done else outcome.error
    if error:
        study.fail(trial, error)
        _print(console, f"trial {number_of(trial)} failed: ", error)
    results.write(study, wanted)
    return 0


def _complete(study: Study, trial: Any, wanted: Sweep, outcome: TrialOutcome, console: Console) -> str:
    run_folder = wanted.output / "runs" / trial.user_attrs["run"]
    try:
        artifacts = [objective.artifact(run_folder) for objective in wanted.objectives]
        intervals = [objective.read(artifact) for objective, artifact in zip(wanted.objectives, artifacts, strict=True)]
    except ConfigError:
        study.again(trial)
        raise
    except AlignmentError as error:
        return str(error)
    study.complete(trial, intervals, artifacts, unmet=outcome.error)
    values = [f"{name} {interval.mean:.3f}" for name, interval in zip(wanted.objectives, intervals, strict=True)]
    _print(console, f"trial {number_of(trial)}: ", ", ".join(values))
    if outcome.error:
        _print(console, f"trial {number_of(trial)} does not meet a gate: ", outcome.error)
    return ""


def _print(console: Console, words: str, more: str) -> None:
    console.print(words, end="", highlight=False)
    console.print(more, markup=False, highlight=False, soft_wrap=True)


# ---- trials in separate processes -----------------------------------------------------------------------------------


class _SeparateTrial:
    """A running trial in a separate process, and its watched curve."""

    def __init__(self, trial: Any, wanted: Sweep, share: Share, console: Console) -> None:
        self.trial, self.share = trial, share
        self.pruned_at: int | None = None
        self._name = f"trial {number_of(trial)}"
        self._console = console
        self._curve = Curve(wanted, trial)
        self._stage = ""
        self.run_folder = wanted.output / "runs" / trial.user_attrs["run"]
        log = wanted.folder / f"trial-{number_of(trial)}.log"
        _print(console, f"[bold]{self._name}[/]  ", f"{' '.join(results.words(trial.params))}  (log: {log})")
        argv = [wanted.recipe, *_overrides(wanted, trial)]
        self.process = Running(self.run_folder, argv, log=log, share=share)

    def ended(self) -> TrialOutcome | None:
        """The outcome of the trial, or None while it runs: it then prints a new stage, and stops a hopeless trial.
        Raises ConfigError: the curve lacks the metric for pruning."""
        outcome = self.process.ended()
        if outcome is None:
            self._watch()
        elif outcome.is_done:
            self._curve.hopeless_at()  # reports the steps since the last check, and those of a reused stage
        return outcome

    def _watch(self) -> None:
        stage = self.process.stage()
        if stage and stage != self._stage:
            _print(self._console, f"{self._name}: ", stage)
            self._stage = stage
        if self.pruned_at is None and (step := self._curve.hopeless_at()) is not None:
            self.pruned_at = step
            self.process.ask_to_stop()


def _in_parallel(study: Study, wanted: Sweep, shares_of_machine: Sequence[Share], console: Console) -> int:
    running: list[_SeparateTrial] = []
    try:
        with termination_raises():
            return _to_the_end(study, wanted, list(shares_of_machine), running, console)
    except (KeyboardInterrupt, Terminated) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED
        console.print("asking the trials to stop", highlight=False)
    finally:
        stop_all([unfinished.process for unfinished in running], wanted.launch.grace_seconds)
        for unfinished in running:
            study.again(unfinished.trial)
        _name_remaining_jobs([unfinished.run_folder for unfinished in running], console)
    console.print("stopped; run the same command to continue from here", highlight=False)
    return code


def _name_remaining_jobs(run_folders: Sequence[Path], console: Console) -> None:
    """Names trials whose jobs Slurm keeps: the processes that ended here only waited for them."""
    names = [folder.name for folder in run_folders if slurm_jobs.read_jobs(folder)]
    if names:
        advice = "`align status` shows them; run the same command once they have ended"
        _print(console, "jobs continue in Slurm: ", f"{', '.join(names)}; {advice}")


def _to_the_end(study: Study, wanted: Sweep, free: list[Share], running: list[_SeparateTrial], console: Console) -> int:
    while True:
        while free and (trial := study.next()) is not None:
            running.append(_SeparateTrial(trial, wanted, free.pop(0), console))
        if not running:
            return 0
        time.sleep(_POLL_SECONDS)
        for running_trial in list(running):
            if (outcome := running_trial.ended()) is None:
                continue
            running_trial.process.close()
            running.remove(running_trial)
            free.append(running_trial.share)
            if not outcome.is_done and running_trial.pruned_at is not None:
                study.prune(running_trial.trial, running_trial.pruned_at)
                console.print(
                    f"trial {number_of(running_trial.trial)} pruned at step {running_trial.pruned_at}", highlight=False
                )
                results.write(study, wanted)
            elif code := _settle(study, running_trial.trial, wanted, outcome, console):
                return code
