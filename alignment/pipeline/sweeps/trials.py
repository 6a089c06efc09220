"""Parallel trials: each is a separate process with a share of the machine, and logs to a file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.faults import suggestion
from alignment.config.launch import LaunchConfig
from alignment.config.sweep import Pruner
from alignment.core import hardware
from alignment.core.errors import ConfigError, DiskError
from alignment.pipeline.backends import command, slurm
from alignment.pipeline.execute.worker_protocol import tail
from alignment.pipeline.sweeps.sweep_file import Sweep
from alignment.records import training
from alignment.records.run import FILE, RunRecord, StageEntry
from alignment.records.sweep_record import TrialOutcome
from alignment.records.training import METRICS, written_rows

_BUG = 1
_SAVED_LATE_SECONDS = 15.0
"""Time that a run needs to record that it was stopped, after its stage has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of the machine that a trial may use. ``devices`` are names of GPUs; None leaves them as they are."""

    cores: frozenset[int]
    devices: tuple[str, ...] | None = None


def shares(number: int, launch: LaunchConfig) -> list[Share]:
    """The machine's cores and GPUs in ``number`` equal shares; Slurm assigns those of its jobs. Raises ConfigError: the
    machine cannot be divided in this way."""
    if number < 1:
        raise ConfigError(f"{number} is not allowed; 1 or more", where="--at-once")
    if number > 1 and launch.backend.num_machines > 1:
        message = "trials on several machines can only run one after another"
        raise ConfigError(message, where="--at-once", remedy="leave it out")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    devices = [] if slurm.submission(launch) is not None else hardware.visible_devices()
    each = len(devices) // number
    if devices and number > 1 and each < max(1, launch.num_processes):
        most = len(devices) // max(1, launch.num_processes)
        raise ConfigError(
            f"{number} trials of {max(1, launch.num_processes)} processes, but this machine has {len(devices)} GPUs",
            where="--at-once",
            remedy=f"--at-once {most}" if most else f"launch.num_processes={len(devices)}",
        )
    if cores and number > len(cores):  # several trials have the same core
        cores = [cores[index % len(cores)] for index in range(number)]
    own = len(cores) // number
    return [
        Share(
            cores=frozenset(cores[index * own : (index + 1) * own]),
            devices=tuple(devices[index * each : (index + 1) * each]) if devices else None,
        )
        for index in range(number)
    ]


class Running:
    """A running trial."""

    def __init__(self, run_folder: Path, argv: Sequence[str], *, log: Path, share: Share) -> None:
        """Starts the trial. ``argv`` is a recipe and its overrides."""
        self._run_folder, self._log = run_folder, log
        self._outcome = log.with_suffix(".json")
        self._outcome.unlink(missing_ok=True)
        devices = {} if share.devices is None else hardware.only_visible(share.devices)
        with log.open("ab") as sink:
            # It has its own session, so Ctrl-C reaches only the sweep, which then asks its trials to stop.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "alignment.pipeline.sweeps.trial", str(self._outcome), *argv],
                env={**os.environ, **devices, **command.own_code(os.environ.get("PYTHONPATH", ""))},
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if share.cores and hasattr(os, "sched_setaffinity"):
            with suppress(ProcessLookupError):  # it ended already; its outcome is read as usual
                os.sched_setaffinity(self._process.pid, share.cores)

    def stage(self) -> str:
        """The running stage, or an empty text before the first."""
        stages = RunRecord.read_if_any(self._run_folder).stages
        return next((name for name, stage in stages.items() if stage.state == "running"), "")

    def ended(self) -> TrialOutcome | None:
        """The outcome of the trial, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        try:
            return TrialOutcome.read(self._outcome)
        except FileNotFoundError:
            if code == DiskError.exit_code:
                message = f"its files cannot be written, not even the one about its end\n{tail(self._log)}".rstrip()
                remedy, run = "free space and run again: nothing is lost", f"run {self._run_folder.name}"
                return TrialOutcome(code=code, error=str(DiskError(message, where=run, remedy=remedy)))
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            message = f"its process ended {how} without recording an outcome\n{tail(self._log)}"
            return TrialOutcome(code=_BUG, error=message.rstrip())

    def ask_to_stop(self) -> None:
        """Asks the trial to stop and returns at once; the running stage saves first."""
        self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Waits until the trial has ended; kills it after ``seconds``."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Closes the pipe to the trial, which asks it to stop if it still runs."""
        if self._process.stdin is not None:
            self._process.stdin.close()


def stop_all(running: Sequence[Running], grace_seconds: float) -> None:
    """Asks all trials to stop, and returns when they have ended."""
    for trial in running:
        trial.ask_to_stop()
    deadline = time.monotonic() + grace_seconds + _SAVED_LATE_SECONDS
    for trial in running:
        trial.wait(max(0.0, deadline - time.monotonic()))
        trial.close()


class Curve:
    """The metric by which a trial is pruned, if pruning is on."""

    def __init__(self, wanted: Sweep, trial: Any) -> None:
        self._config = wanted.config.pruning
        self._run_folder = wanted.output / "runs" / trial.user_attrs["run"]
        self._trial = trial
        self._former = self._record_file()
        self._last = -1
        # Optuna judges a curve in the direction of the objective.
        self._sign = 1.0 if self._config.minimize == wanted.objectives[0].minimize else -1.0

    def hopeless_at(self) -> int | None:
        """Reports new steps to the study; returns the first step at which the trial should be stopped, or None. A
        finished stage, such as one that is shared with other trials, is reported but not stopped. Raises ConfigError:
        the stage's first line lacks the metric, so nothing would ever be pruned; the error suggests one."""
        if self._config.pruner is Pruner.none:
            return None
        for step, value in self._new_steps():
            self._last = step
            self._trial.report(self._sign * value, step)
            if self._entry().state == "running" and self._trial.should_prune():
                return step
        return None

    def _new_steps(self) -> Iterator[tuple[int, float]]:
        rows = self._rows()
        comes_later = self._config.metric in training.HELD_OUT  # with the first look at held-out rows
        if rows and not comes_later and not any(self._config.metric in row for row in rows):
            names = sorted({name for row in rows for name in row} - {"step", "seconds"})
            raise ConfigError(
                f"stage {self._config.stage} does not log {self._config.metric!r} while it trains; "
                f"{suggestion(self._config.metric, names)}",
                where="pruning.metric",
            )
        for row in rows:
            value = row.get(self._config.metric)
            if row["step"] > self._last and isinstance(value, (int, float)) and math.isfinite(value):
                yield row["step"], float(value)

    def _rows(self) -> list[dict[str, Any]]:
        artifact = self._entry().artifact
        for folder in [Path(artifact), Path(f"{artifact}.work") / "content"] if artifact else []:
            with suppress(FileNotFoundError):
                return written_rows(folder / METRICS)
        return []

    def _record_file(self) -> tuple[int, int] | None:
        try:
            stat = (self._run_folder / FILE).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _entry(self) -> StageEntry:
        """What the trial's run records of the stage; nothing while the record is that of an earlier run of its name."""
        if self._former is not None and self._record_file() == self._former:
            return StageEntry()
        self._former = None
        return RunRecord.read_if_any(self._run_folder).stages.get(self._config.stage, StageEntry())
