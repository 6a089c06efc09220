"""A recipe many times over with other settings: each trial is a run of its own, judged by its result.

Stages that a setting does not reach are made once, because results are found again by their fingerprints. The study is
a journal of lines beside the trials; a sweep that was stopped goes on with what is missing (docs/design/0012).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from alignment.config.sweep import Pruner
from alignment.core.errors import PREEMPTED, AlignmentError, Busy, ConfigError
from alignment.core.locks import held
from alignment.pipeline.execute.run import run
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, termination_raises
from alignment.pipeline.sweeps import results
from alignment.pipeline.sweeps.pruning import Curve
from alignment.pipeline.sweeps.study import Study, number_of
from alignment.pipeline.sweeps.sweep_file import Sweep, read_sweep
from alignment.pipeline.sweeps.trials import Running, Share, shares, stop_all
from alignment.records.sweep import TrialOutcome

_POLL_SECONDS = 0.5


def sweep(recipe: str, name: str, overrides: Sequence[str], *, console: Console, at_once: int = 1) -> int:
    """Runs the trials that are missing; returns the exit code: 0 if any trial ever came to its end.

    Raises:
        ConfigError: the sweep does not fit the recipe or the machine, no stage reports its objective, or optuna is not
            installed.
        Busy: another process works on it, or Slurm has jobs of a trial.
    """
    wanted = read_sweep(recipe, name, overrides)
    parts = shares(at_once, wanted.launch)
    study = Study(wanted)
    with held(wanted.folder / "lock", wait=False):
        study.retry_cut_off()
        console.print(f"{wanted.name}: {wanted.number} trials of {wanted.run_name}", highlight=False)
        for caution in wanted.cautions:
            _say(console, "caution: ", caution)
        apart = at_once > 1 or wanted.config.pruning.pruner is not Pruner.none
        code = _apart(study, wanted, parts, console) if apart else _in_turn(study, wanted, console)
        if code:
            return code
        results.show(console, results.write(study, wanted), wanted)
    return 0 if study.completed() else 5


def _in_turn(study: Study, wanted: Sweep, console: Console) -> int:
    """Trials one after another, in this process; returns the code of a stop, or 0 when all were made."""
    while (trial := study.next()) is not None:
        _say(console, f"[bold]trial {number_of(trial)}[/]  ", " ".join(results.words(trial.params)))
        try:
            outcome = TrialOutcome(code=run(wanted.recipe, _overrides(wanted, trial), console=console, wait=True))
        except AlignmentError as error:
            outcome = TrialOutcome(code=error.exit_code, error=str(error))
        if code := _settle(study, trial, wanted, outcome, console):
            return code
    return 0


def _overrides(wanted: Sweep, trial: Any) -> list[str]:
    group = f"tracking.group={wanted.run_name}.{wanted.name}"
    return [group, *wanted.overrides, *results.words(trial.params), f"name={trial.user_attrs['run']}"]


def _settle(study: Study, trial: Any, wanted: Sweep, outcome: TrialOutcome, console: Console) -> int:
    """Tells the study how a trial ended; a fault of the trial is written down and ends no sweep.

    Returns the code of a stop, or 0.

    Raises:
        ConfigError: the trial is done, and what the sweep judges by is not there; so it would be with all.
        Busy: Slurm has jobs of the trial.
    """
    run_folder = wanted.output / "runs" / trial.user_attrs["run"]
    if outcome.code in (INTERRUPTED, PREEMPTED):
        study.again(trial)  # what it has made is found again
        return outcome.code
    if outcome.code == Busy.exit_code:
        study.again(trial)
        raise Busy(outcome.error)
    error = outcome.error
    if not outcome.code:
        try:
            artifacts = [one.artifact(run_folder) for one in wanted.objectives]
            figures = [one.read(artifact) for one, artifact in zip(wanted.objectives, artifacts, strict=True)]
            study.complete(trial, figures, artifacts)
            told = [f"{name} {figure.mean:.3f}" for name, figure in zip(wanted.objectives, figures, strict=True)]
            _say(console, f"trial {number_of(trial)}: ", ", ".join(told))
        except ConfigError:
            study.again(trial)
            raise
        except AlignmentError as fault:
            error = str(fault)
    if error:
        study.fail(trial, error)
        _say(console, f"trial {number_of(trial)} failed: ", error)
    results.write(study, wanted)
    return 0


def _say(console: Console, words: str, more: str) -> None:
    """``words`` may hold markup, ``more`` is shown as it is."""
    console.print(words, end="", highlight=False)
    console.print(more, markup=False, highlight=False, soft_wrap=True)


# ---- trials in processes of their own -------------------------------------------------------------------------------


class _Apart:
    """A trial under way in a process of its own, and what is watched of it."""

    def __init__(self, trial: Any, wanted: Sweep, share: Share, console: Console) -> None:
        self.trial = trial
        self.share = share
        self.pruned_at: int | None = None
        self._name = f"trial {number_of(trial)}"
        self._console = console
        self._curve = Curve(wanted, trial)
        self._stage = ""
        log = wanted.folder / f"trial-{number_of(trial)}.log"
        _say(console, f"[bold]{self._name}[/]  ", f"{' '.join(results.words(trial.params))}  (log: {log})")
        argv = [wanted.recipe, *_overrides(wanted, trial)]
        self.process = Running(wanted.output / "runs" / trial.user_attrs["run"], argv, log=log, share=share)

    def ended(self) -> TrialOutcome | None:
        """How it ended, or None while it runs: then says which stage it is at, and stops it if its curve is hopeless.

        Raises:
            ConfigError: its curve does not show the metric that it is watched by.
        """
        outcome = self.process.ended()
        if outcome is None:
            self._watch()
        elif not outcome.code:
            self._curve.hopeless_at()  # the study hears of the steps since the last look, and of a stage made by others
        return outcome

    def _watch(self) -> None:
        stage = self.process.stage()
        if stage and stage != self._stage:
            _say(self._console, f"{self._name}: ", stage)
            self._stage = stage
        if self.pruned_at is None and (step := self._curve.hopeless_at()) is not None:
            self.pruned_at = step
            self.process.ask_to_stop()


def _apart(study: Study, wanted: Sweep, parts: Sequence[Share], console: Console) -> int:
    """As many trials at once as the machine has parts; returns the code of a stop, or 0 when all were made."""
    running: list[_Apart] = []
    try:
        with termination_raises():
            return _to_the_end(study, wanted, list(parts), running, console)
    except (KeyboardInterrupt, Terminated) as stop:
        code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED
        console.print("asking the trials to stop", highlight=False)
    finally:
        stop_all([one.process for one in running], wanted.launch.grace_seconds)
        for one in running:
            study.again(one.trial)
    console.print("stopped; the same command goes on from here", highlight=False)
    return code


def _to_the_end(study: Study, wanted: Sweep, free: list[Share], running: list[_Apart], console: Console) -> int:
    """Keeps every part of the machine at work; ``running`` says at any time who is."""
    while True:
        while free and (trial := study.next()) is not None:
            running.append(_Apart(trial, wanted, free.pop(0), console))
        if not running:
            return 0
        time.sleep(_POLL_SECONDS)
        for one in list(running):
            if (outcome := one.ended()) is None:
                continue
            one.process.close()
            running.remove(one)
            free.append(one.share)
            if outcome.code and one.pruned_at is not None:
                study.prune(one.trial, one.pruned_at)
                console.print(f"trial {number_of(one.trial)} pruned at step {one.pruned_at}", highlight=False)
                results.write(study, wanted)
            elif code := _settle(study, one.trial, wanted, outcome, console):
                return code
