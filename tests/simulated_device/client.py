"""The other end of server.py: a test asks for a stage or a piece of code on the simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.simulated_device import DEVICES
from tests.simulated_device.outcomes import Outcome, outcome_of
from tests.simulated_device.stages import Cell


class Device:
    """A process that has imported everything, with the device, and forks for each piece of work."""

    def __init__(self, *, devices: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.simulated_device", "-m", "tests.simulated_device.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, DEVICES: str(devices), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, cell: Cell, *, processes: int = 1) -> Outcome:
        """Runs a stage in a folder of its own, on as many processes, each with its own device."""
        return self._ask({"cell": cell.to_json(), "processes": processes})

    def execute(self, code: str) -> Outcome:
        """Runs a piece of Python, in which torch is imported."""
        return self._ask({"code": code})

    def _ask(self, request: dict[str, Any]) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process with the device ended with {self._process.wait()}"
        return outcome_of(line)

    def close(self) -> None:
        """Ends it."""
        with self._process:
            pass
