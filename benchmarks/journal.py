"""Single measurements, one JSON line each, so that an interrupted run loses one of them at most."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class OtherConditions(Exception):
    """What was measured before was measured under other conditions, so going on would mix the two."""


class Journal:
    """``path`` holds the lines. A measurement that failed is not done: it is tried again."""

    def __init__(self, path: Path, conditions: dict[str, Any], *, resume: bool) -> None:
        """Starts empty, or with what is there if ``resume``.

        Raises:
            OtherConditions: names what differs.
        """
        self._path = path
        self._conditions = conditions
        self.entries: list[dict[str, Any]] = self._read() if resume else []
        for entry in self.entries:
            told = entry["conditions"]
            if differing := sorted(k for k in told.keys() | conditions.keys() if told.get(k) != conditions.get(k)):
                raise OtherConditions(f"{path.name} was measured under another {', '.join(differing)}")
        self._write()

    def is_done(self, contestant: str, repetition: int) -> bool:
        """Whether it was measured."""
        return any(self._is(entry, contestant, repetition) and "result" in entry for entry in self.entries)

    def add(self, contestant: str, repetition: int, **content: Any) -> None:
        """Takes the place of an earlier failure of the same; on disk at once."""
        self.entries = [entry for entry in self.entries if not self._is(entry, contestant, repetition)]
        entry = {"contestant": contestant, "repetition": repetition, "conditions": self._conditions, **content}
        self.entries.append(entry)
        self._write()

    def _is(self, entry: dict[str, Any], contestant: str, repetition: int) -> bool:
        return bool(entry["contestant"] == contestant and entry["repetition"] == repetition)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        temporary.replace(self._path)
