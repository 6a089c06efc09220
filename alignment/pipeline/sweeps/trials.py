"""Trials at the same time: each a process of its own with its share of the machine, what it prints kept in a file."""

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
from alignment.core.errors import ArtifactError, ConfigError
from alignment.pipeline.backends import environment, slurm
from alignment.pipeline.execute.worker_protocol import tail
from alignment.records.run import RunRecord
from alignment.records.sweep import TrialOutcome

_BUG = 1
_SAVED_LATE_SECONDS = 15.0
"""What a run takes to write down that it was stopped, once its stage has ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What of the machine a trial may use. ``devices`` are names of GPUs, None where nothing is said of them."""

    cores: frozenset[int]
    devices: tuple[str, ...] | None = None


def shares(number: int, launch: LaunchConfig) -> list[Share]:
    """The machine in ``number`` equal parts, of cores and of GPUs; jobs of Slurm get theirs from Slurm.

    Raises:
        ConfigError: it cannot be shared so.
    """
    if number < 1:
        raise ConfigError(f"{number} is not allowed; 1 or more", where="--at-once")
    if number > 1 and launch.backend.num_machines > 1:
        raise ConfigError("trials on several machines run one after another", where="--at-once", remedy="leave it out")
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
            cores=frozenset(_part(cores, place, number)),
            devices=tuple(devices[place * each : (place + 1) * each]) if devices else None,
        )
        for place in range(number)
    ]


def _part(cores: Sequence[int], place: int, number: int) -> Sequence[int]:
    """Neighbouring cores; where there are fewer than trials, several trials have the same."""
    each = len(cores) // number
    return cores[place * each : (place + 1) * each] if each else cores[place % len(cores) :][:1] if cores else ()


class Running:
    """A trial under way."""

    def __init__(self, run_folder: Path, argv: Sequence[str], *, log: Path, share: Share) -> None:
        """Starts it. ``argv`` is a recipe and its overrides."""
        self._run_folder = run_folder
        self._log = log
        self._outcome = log.with_suffix(".json")
        self._outcome.unlink(missing_ok=True)
        devices = {} if share.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(share.devices)}
        with log.open("ab") as sink:
            # A session of its own: Ctrl-C reaches the sweep alone, which then asks its trials to stop.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "alignment.pipeline.sweeps.trial", str(self._outcome), *argv],
                env={**os.environ, **devices, **environment.own_code(os.environ.get("PYTHONPATH", ""))},
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if share.cores and hasattr(os, "sched_setaffinity"):
            with suppress(ProcessLookupError):  # what it has to say of its end is read as always
                os.sched_setaffinity(self._process.pid, share.cores)

    def stage(self) -> str:
        """The stage that it is at, or nothing before the first."""
        try:
            stages = RunRecord.read(self._run_folder).stages
        except ArtifactError:
            return ""
        return next((name for name, stage in stages.items() if stage.state == "running"), "")

    def ended(self) -> TrialOutcome | None:
        """How it ended, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        try:
            return TrialOutcome.read(self._outcome)
        except FileNotFoundError:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return TrialOutcome(code=_BUG, error=f"its process ended {how} without a word\n{tail(self._log)}".rstrip())

    def ask_to_stop(self) -> None:
        """Returns at once; the stage that runs saves first."""
        self._process.terminate()

    def wait(self, seconds: float) -> None:
        """Returns when it has ended, or after ``seconds``, when it is killed."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Lets go of it; where it still runs, it takes the closed pipe for a wish to stop."""
        if self._process.stdin is not None:
            self._process.stdin.close()


def stop_all(running: Sequence[Running], grace_seconds: float) -> None:
    """Asks all to stop and returns when they have."""
    for one in running:
        one.ask_to_stop()
    deadline = time.monotonic() + grace_seconds + _SAVED_LATE_SECONDS
    for one in running:
        one.wait(max(0.0, deadline - time.monotonic()))
        one.close()
