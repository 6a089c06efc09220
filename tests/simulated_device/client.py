"""What a test asks of the device, and what a piece of work left: its error, and the events that it caused. The other
end is server.py; requests and outcomes travel as lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.simulated_device import DEVICES
from tests.simulated_device.events import FAULT, WAIT, Event
from tests.simulated_device.stages import Cell

Counts = Mapping[Event, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """``error`` is a traceback, or empty. ``events`` are all that were counted.

    ``steps`` are the events of each optimiser step but the first; ``decoded`` counts the tokens that
    batches of answers grew by. ``result`` is what a piece of code left under that name.
    """

    error: str = ""
    events: Counts = field(default_factory=Counter)
    steps: Sequence[Counts] = ()
    decoded: int = 0
    result: Any = None

    @property
    def faults(self) -> list[str]:
        return [f"{count} × {event}" for event, count in self.events.items() if event.kind == FAULT]

    def count(self, kind: str) -> int:
        return sum(number for event, number in self.events.items() if event.kind == kind)

    def to_json(self) -> str:
        steps = [_listed(step) for step in self.steps]
        values = {"error": self.error, "events": _listed(self.events), "steps": steps}
        return json.dumps({**values, "decoded": self.decoded, "result": self.result})


def outcome_of(line: str) -> Outcome:
    values = json.loads(line)
    steps = [_counts(step) for step in values.pop("steps")]
    return Outcome(events=_counts(values.pop("events")), steps=steps, **values)


def waits(counts: Counts, *, own: bool) -> int:
    return sum(count for event, count in counts.items() if event.kind == WAIT and event.is_own is own)


def listing(counts: Counts) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return "\n".join(f"{count:4} × {event}" for event, count in ordered if event.kind == WAIT)


def _listed(counts: Counts) -> list[tuple[dict[str, Any], int]]:
    return [(asdict(event), count) for event, count in counts.items()]


def _counts(listed: Sequence[tuple[dict[str, Any], int]]) -> Counter[Event]:
    return Counter({Event(**{**event, "lines": tuple(event["lines"])}): count for event, count in listed})


class Device:
    def __init__(self, *, devices: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulated_device", "-m", "tests.simulated_device.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, DEVICES: str(devices), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, cell: Cell, *, processes: int = 1) -> Outcome:
        return self._ask({"cell": asdict(cell), "processes": processes})

    def execute(self, code: str) -> Outcome:
        return self._ask({"code": code})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process with the device ended with {self._process.wait()}"
        return outcome_of(line)

    def close(self) -> None:
        with self._process:
            pass
