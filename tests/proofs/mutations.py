"""Every deliberate fault in the wiring turns a test red (tests/faults), so that a green suite says something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.proofs.common import Claim

FEWEST = 60


def run(folder: Path) -> list[Claim]:
    """All of the table, in a process that has not imported our code."""
    record = folder / "mutations.json"
    jobs = min(4, os.cpu_count() or 1)
    argv = [sys.executable, "-m", "tests.faults", "--jobs", str(jobs), "--record", str(record)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if not record.is_file():
        raise AssertionError(f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    outcome = json.loads(record.read_text(encoding="utf-8"))
    for name in outcome["survived"]:
        print(f"  survived: {name}", file=sys.stderr)
    return [
        Claim(figure="faults in the wiring", values=(float(outcome["faults"]),), at_least=FEWEST),
        Claim(
            figure="share of them that a test notices", values=(outcome["caught"] / outcome["faults"],), at_least=1.0
        ),
    ]
