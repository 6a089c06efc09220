"""torchrun's report on the processes of a launch, read from the end of a stage's log: which of them failed first."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from alignment.core.deadline import KILLED_BY

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
class ProcessFailure:
    """A process that failed; a negative exit code is a signal."""

    rank: int
    exit_code: int

    @property
    def is_killed(self) -> bool:
        """Whether a signal ended it that no other process sends."""
        return self.exit_code in _SIGNALS


def first_failure(printed: str) -> ProcessFailure | None:
    """The failure that caused the others; None if ``printed`` has no report.

    torchrun calls the first in time the root cause, by the second. A process that lost its connection to a killed one
    fails within the same second, so among those of the first seconds a killed process goes before the others.
    """
    failures = [
        (datetime.strptime(match["time"], _TIME), ProcessFailure(int(match["rank"]), int(match["code"])))
        for match in _FAILURE.finditer(printed)
    ]
    root_cause_first = [*failures[-1:], *failures[:-1]]
    return _earliest(root_cause_first) if failures else None


def _earliest(failures: Sequence[tuple[datetime, ProcessFailure]]) -> ProcessFailure:
    start = min(time for time, _ in failures)
    first = [(not failure.is_killed, time, failure) for time, failure in failures if time - start <= _TOGETHER]
    return min(first, key=lambda entry: entry[:2])[2]
