"""Parallel trials: each is a separate process with a share of the machine, and logs to a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from alignment.config.launch import LaunchConfig
from alignment.core import hardware
from alignment.core.errors import ArtifactError, ConfigError, DiskError
from alignment.pipeline.backends import environment, slurm
from alignment.pipeline.execute.worker_protocol import tail
from alignment.records.run import RunRecord
from alignment.records.sweep_record import TrialOutcome

_BUG = 1
_SAVED_LATE_SECONDS = 15.0
"""Time that a run needs to record that it was stopped, after its stage has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of the machine that a trial may use. ``devices`` are names of GPUs; None leaves them as they are."""

    cores: frozenset[int]
    devices: tuple[str, ...] | None = None


def shares(number: int, launch: LaunchConfig) -> list[Share]:
    """The machine's cores and GPUs in ``number`` equal shares; Slurm assigns those of its jobs.

    Raises:
        ConfigError: the machine cannot be divided in this way.
    """
    if number < 1:
        raise ConfigError(f"{number} is not allowed; 1 or more", where="--at-once")
    if number > 1 and launch.backend.num_machines > 1:
        raise ConfigError(
            "trials on several machines can only run one after another", where="--at-once", remedy="leave it out"
        )
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
    return [
        Share(
            cores=frozenset(_cores_of(cores, index, number)),
            devices=tuple(devices[index * each : (index + 1) * each]) if devices else None,
        )
        for index in range(number)
    ]


def _cores_of(cores: Sequence[int], index: int, number: int) -> Sequence[int]:
    """The cores of one share; with fewer cores than trials, several trials have the same core."""
    each = len(cores) // number
    return cores[index * each : (index + 1) * each] if each else cores[index % len(cores) :][:1] if cores else ()


class Running:
    """A running trial."""

    def __init__(self, run_folder: Path, argv: Sequence[str], *, log: Path, share: Share) -> None:
        """Starts the trial. ``argv`` is a recipe and its overrides."""
        self._run_folder = run_folder
        self._log = log
        self._outcome = log.with_suffix(".json")
        self._outcome.unlink(missing_ok=True)
        devices = {} if share.devices is None else hardware.only_visible(share.devices)
        with log.open("ab") as sink:
            # It has its own session, so Ctrl-C reaches only the sweep, which then asks its trials to stop.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "alignment.pipeline.sweeps.trial", str(self._outcome), *argv],
                env={**os.environ, **devices, **environment.own_code(os.environ.get("PYTHONPATH", ""))},
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
        try:
            stages = RunRecord.read(self._run_folder).stages
        except ArtifactError:
            return ""
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
                return TrialOutcome(code=code, error=str(self._without_room()))
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return TrialOutcome(
                code=_BUG, error=f"its process ended {how} without recording an outcome\n{tail(self._log)}".rstrip()
            )

    def _without_room(self) -> DiskError:
        return DiskError(
            f"its files cannot be written, not even the one about its end\n{tail(self._log)}".rstrip(),
            where=f"run {self._run_folder.name}",
            remedy="free space and run again: nothing is lost",
        )

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
