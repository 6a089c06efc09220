"""The frozen ``stage.yaml`` that a worker gets, and what its status means for the run (records/worker.py)."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from alignment.config.launch import LaunchConfig
from alignment.config.model import ModelConfig
from alignment.config.typed import to_plain
from alignment.core.deadline import KILLED_BY
from alignment.core.errors import PREEMPTED as PREEMPTED_CODE
from alignment.core.errors import (
    AlignmentError,
    ArtifactError,
    Busy,
    ConfigError,
    DataError,
    DiskError,
    ModelError,
    NonFiniteError,
    Preempted,
    RewardError,
    StageError,
    StoreError,
)
from alignment.core.files import disk_error, is_full, write_text
from alignment.core.terminal import of_last_attempt
from alignment.data.chat_template import template_file
from alignment.job import StageInput
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records.worker import DONE, PREEMPTED, Progress, Status
from alignment.stages.registry import OURS, origin_of

_FAILURE = re.compile(
    r"^\s*time\s*: (?P<time>\S+)\s*\n"
    r"^\s*host\s*:.*\n"
    r"^\s*rank\s*: (?P<rank>\d+)\b.*\n"
    r"^\s*exitcode\s*: (?P<code>-?\d+)\b",
    re.MULTILINE,
)
_TIME = "%Y-%m-%d_%H:%M:%S"
_SIGNALS = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -KILLED_BY}
"""Exit codes of processes that no other process brings down: losing a connection raises an error, or aborts."""
_TOGETHER = timedelta(seconds=5)
"""torchrun looks at all processes at once. Those it kills itself it kills half a minute after the first failure."""


@dataclass(frozen=True)
class _ProcessFailure:
    """A process that failed; a negative exit code is a signal."""

    time: datetime
    rank: int
    exit_code: int


def _first_failure(printed: str) -> _ProcessFailure | None:
    """The failure that caused the others; None if ``printed`` has no report. torchrun calls the first in time the root
    cause, by the second. A process that lost its connection to a killed one fails within the same second, so among
    those of the first seconds a killed process goes before the others."""
    failures = [
        _ProcessFailure(datetime.strptime(match["time"], _TIME), int(match["rank"]), int(match["code"]))
        for match in _FAILURE.finditer(printed)
    ]
    start = min((failure.time for failure in failures), default=datetime.min)
    root_cause_first = [*failures[-1:], *failures[:-1]]
    first = [failure for failure in root_cause_first if failure.time - start <= _TOGETHER]
    return min(first, key=lambda failure: (failure.exit_code not in _SIGNALS, failure.time), default=None)


_OF_STAGES = (StageError, DiskError, NonFiniteError, RewardError)
ERRORS: dict[int, type[AlignmentError]] = {
    error.exit_code: error
    for error in (ConfigError, DataError, ModelError, ArtifactError, Busy, StoreError, *_OF_STAGES)
}
"""The kind of error that an exit code stands for."""
_GIT_SECONDS = 30.0
_TAIL_LINES = 15
_REPORT_LINES = 200
"""The last lines of a log, among which a launcher reports on its processes: eight lines a process."""
_BUG = 1


def write_stage_file(
    plan: Plan, stage: PlannedStage, launch: LaunchConfig, *, git_commit: str, folder: Path | None = None
) -> Path:
    """Writes ``runs/<run>/<stage>/stage.yaml``, or ``stage.yaml`` in ``folder``; returns its path."""
    folder = folder or plan.run_folder / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stage.yaml"
    content = {
        "run": plan.config.name,
        "recipe": Path(plan.recipe).stem,
        "stage": stage.name,
        "config": to_plain(stage.config),
        "model": _model(plan.config.model),
        "base_path": str(plan.base.folder),
        "inputs": {field: _input(stage_input) for field, stage_input in stage.inputs.items()},
        "arms": {arm: _input(stage_input) for arm, stage_input in stage.arms.items()},
        "data_path": str(stage.data),
        "extra_data": {field: str(path) for field, path in stage.extra_data.items()},
        "fingerprint": stage.fingerprint,
        "identity": stage.identity,
        "input_fingerprints": stage.input_fingerprints,
        "artifact": str(stage.artifact),
        "work": str(stage.work),
        "run_folder": str(folder),
        "seed": plan.config.seed,
        "launch": {"sharding": launch.sharding.value, "offload": launch.offload.value},
        "tracking": to_plain(plan.config.tracking),
        "git_commit": git_commit,
    }
    write_text(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def _model(config: ModelConfig) -> dict[str, Any]:
    plain: dict[str, Any] = to_plain(config)
    file = None if config.chat_template is None else template_file(config.chat_template)
    return plain if file is None else plain | {"chat_template": f"path:{file}"}


def raise_for_status(folder: Path, *, code: int, stage: str, kinds: Iterable[str], work: Path | None = None) -> None:
    """Returns if the stage in ``folder`` ended well; ``code`` is its launcher's exit code. ``work`` is where it wrote
    what it was doing. ``kinds`` are the kinds of stage whose code ran. Of its log, only the last attempt counts. Raises
    Preempted: it saved and stopped on request; AlignmentError: it failed; the kind of error is the worker's own if it
    reported one; ArtifactError: its status is damaged."""
    log = folder / "log.txt"
    status = Status.read(folder)
    printed = "\n".join(_last_lines(of_last_attempt(log), _REPORT_LINES)) if log.exists() else ""
    first = _first_failure(printed)
    if status is None and is_full(folder):
        full = disk_error(OSError(errno.ENOSPC, "", str(folder)), folder=folder)
        assert full is not None, "the exit code means a full disk"
        message = f"{full.message}; it could not record how it ended"
        raise DiskError(message, where=f"stage {stage}", remedy=full.remedy)
    # If a process was killed, the others only report that they lost their connection to it.
    if status is None or (status.exit_code == _BUG and first is not None and first.exit_code in _SIGNALS):
        who = "its process" if first is None else f"process {first.rank}"
        progress = None if work is None else Progress.read(work)
        phase = "" if progress is None else f" in the phase '{progress.phase}'"
        message = f"{who} ended {_how(code, first, printed)}{phase} without reporting an error\n{tail(log)}"
        raise StageError(message, where=f"stage {stage}", remedy=f"log: {log}")
    if status.state == DONE:
        return
    if status.state == PREEMPTED or status.exit_code == PREEMPTED_CODE:
        raise Preempted(f"stage {stage} was asked to stop", remedy="start the run again to continue")
    kind = ERRORS.get(status.exit_code)
    if kind is not None:
        raise kind(f"{status.error}\n  log: {log}", where=status.where)
    others = sorted({origin for origin in map(origin_of, kinds) if origin != OURS})
    by_others = f"look for the bug in {' or '.join(others)}, which adds this kind of stage"
    bug = by_others if others else "this is a bug in this project"
    raise AlignmentError(f"{status.error}\n{tail(log)}", where=f"stage {stage}", remedy=f"{bug}; the log is {log}")


def notes(folder: Path) -> list[str]:
    """The notes in the status of the stage in ``folder``."""
    status = Status.read(folder)
    return [] if status is None else status.notes


def tail(log: Path) -> str:
    """The last lines of a log, indented; empty if there is no log."""
    if not log.exists():
        return ""
    return "\n".join(f"  | {line}" for line in _last_lines(log.read_bytes(), _TAIL_LINES))


def _last_lines(printed: bytes, number: int) -> list[str]:
    return printed.decode(errors="replace").splitlines()[-number:]


def commit_of_checkout(root: Path) -> str:
    """The git commit of the running code, or an empty string without its history or without git."""
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        outcome = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return outcome.stdout.strip() if outcome.returncode == 0 else ""


def _how(code: int, first: _ProcessFailure | None, printed: str) -> str:
    """A launcher has its own exit code for a worker's signal, and names the signal in its output."""
    if first is not None:
        code, printed = first.exit_code, ""
    if code == -signal.SIGKILL or "SIGKILL" in printed or "Signal 9" in printed:
        return "by signal 9 (often because the machine ran out of memory; a smaller micro_batch_tokens helps)"
    if code == -KILLED_BY or KILLED_BY.name in printed:
        return f"by {KILLED_BY.name} (a chat template did not finish; set model.chat_template)"
    if code == 1:  # also of a process whose end nobody saw (pipeline/backends/forking.py)
        return "with exit code 1, or was killed together with the process that started it,"
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _input(stage_input: StageInput) -> dict[str, str | None]:
    return {"ref": stage_input.ref, "path": None if stage_input.path is None else str(stage_input.path)}
