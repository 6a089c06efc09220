"""Where a stage's rows come from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """``source`` is ``bundled:quickstart/NAME`` or ``path:FILE.jsonl``.

    ``limit`` takes the first rows only; None takes all. A result is defined by what the file holds, not by where it
    lies, so ``source`` is no part of a fingerprint; the content's hash is.
    """

    source: str = field(metadata={"identity": False})
    limit: int | None = None
