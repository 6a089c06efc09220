"""What the device reports while Python runs: waits of the host, copies without a wait, faults, each with its line."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[2]
WAIT, COPY, FAULT = "wait", "copy", "fault"
_PACKAGE, _LIBRARIES = f"{ROOT}/alignment/", "site-packages/"
_DEPTH = 3
"""Lines of the project that an event names, innermost first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """``name`` is an operator or a kind of copy.

    ``lines`` are those of the package, innermost first; ``library`` is the line of another library that was called from
    there and asked, or empty.

    Example: ``Event(kind="wait", name="aten::_local_scalar_dense", lines=("alignment/training/finite.py:163",),
    library="")``.
    """

    kind: str
    name: str
    lines: tuple[str, ...]
    library: str

    @property
    def is_own(self) -> bool:
        return bool(self.lines) and not self.library

    def __str__(self) -> str:
        asked = " < ".join(self.lines) or "no line of the package"
        return f"{self.kind}: {self.name}, {asked}" + (f", in {self.library}" if self.library else "")


events: Counter[Event] = Counter()
"""All events of this process so far."""
_quiet = threading.local()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    before = getattr(_quiet, "on", False)
    _quiet.on = True
    try:
        yield
    finally:
        _quiet.on = before


def count(kind: str, name: str) -> None:
    if not getattr(_quiet, "on", False):
        lines, library = _lines(sys._getframe(1))
        events[Event(kind=kind, name=name, lines=lines, library=library)] += 1


def _lines(frame: FrameType | None) -> tuple[tuple[str, ...], str]:
    lines: list[str] = []
    library = ""
    while frame is not None and len(lines) < _DEPTH:
        file = frame.f_code.co_filename
        outside = file.rpartition(_LIBRARIES)[2] if _LIBRARIES in file else ""
        if outside:
            if not lines and not library and not outside.startswith("torch/"):
                library = f"{outside}:{frame.f_lineno}"
        elif file.startswith(_PACKAGE):
            lines.append(f"{file[len(str(ROOT)) + 1 :]}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(lines), library
