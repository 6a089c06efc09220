"""What is tried on a card, one program after another, and how each ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment.records.run import RunRecord
from benchmarks.machine import ROOT, scrubbed

BUDGET = 600.0
"""Seconds for all checks together."""
_SHOWN_LINES = 12
_FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) .*$", re.MULTILINE)
Figures = dict[str, float | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A program that ends with 0 if all is well, within ``seconds``. ``figures`` reads what it measured, from its
    output, once it has ended."""

    name: str
    about: str
    command: Sequence[str]
    seconds: float
    figures: Callable[[str], Figures] = field(default=lambda _: {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a check ended. ``faults`` are lines that say what failed, none if it passed."""

    check: Check
    seconds: float
    faults: Sequence[str] = ()
    figures: Figures = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the program ended with 0 in time."""
        return not self.faults


def all_checks(work: Path, *, stages: str = "") -> list[Check]:
    """The checks, in order; ``work`` is an empty folder for what they leave.

    ``stages`` is a part of the names of the stages that are tried; by default all are.
    """
    tests = (sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider")
    run = work / "run"
    return [
        Check(
            name="gpu tests",
            about="tests that need a GPU: kernels, and sharding over all GPUs against one",
            command=(*tests, "-m", "gpu", "tests/unit", "tests/distributed"),
            seconds=120,
        ),
        Check(
            name="kernels",
            about="the forward pass, attention, heads and four bits against references on the CPU",
            command=(*tests, "tests/unit/models"),
            seconds=150,
        ),
        Check(
            name="stages",
            about="every kind of stage under every adapter, on a tiny model",
            command=(sys.executable, "-m", "tests.simulated_device.on_card", "--only", stages),
            seconds=100,
            figures=_ran_stages,
        ),
        Check(
            name="quickstart",
            about="the recipe quickstart, whole, on SmolLM2-135M",
            command=(sys.executable, "-m", "alignment.cli", "run", "quickstart", f"output={run}"),
            seconds=300,
            figures=lambda _: _of_run(run),
        ),
        Check(
            name="speed",
            about="products, copies and answers, on this card alone",
            command=(sys.executable, "-m", "benchmarks.gpu_check.speed"),
            seconds=60,
            figures=_last_line,
        ),
    ]


def run_all(checks: Sequence[Check], *, budget: float = BUDGET, say: Callable[[str], None] = print) -> list[Outcome]:
    """Runs every check, also after one that failed; what would begin after the budget fails without a trial."""
    started, outcomes = time.monotonic(), []
    for check in checks:
        left = budget - (time.monotonic() - started)
        say(f"{check.name}: {check.about}")
        outcome = run(check, seconds=min(check.seconds, left))
        say(f"{check.name}: {'passed' if outcome.passed else 'FAILED'} after {outcome.seconds:.0f} s")
        for fault in outcome.faults:
            say(f"  {fault}")
        outcomes.append(outcome)
    return outcomes


def run(check: Check, *, seconds: float) -> Outcome:
    """Runs a check for at most so many seconds; what it started ends with it."""
    if seconds <= 0:
        return Outcome(check=check, seconds=0.0, faults=["not run: the earlier checks took all the time"])
    started = time.monotonic()
    process = subprocess.Popen(
        check.command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
        faults = [] if process.returncode == 0 else _faults(printed, process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        faults = [f"not done after {seconds:.0f} s; it was stopped", *_faults(printed, None)]
    took = time.monotonic() - started
    try:
        figures = check.figures(printed)
    except (LookupError, OSError, ValueError) as error:
        figures = {}
        faults = faults or [f"it left no figures: {type(error).__name__}: {error}"]
    return Outcome(check=check, seconds=took, faults=faults, figures=figures)


def _faults(printed: str, code: int | None) -> list[str]:
    """The tests that failed, or the last lines, without addresses and folders."""
    failed = _FAILED_TEST.findall(printed)
    lines = failed or [line for line in printed.splitlines() if line.strip()][-_SHOWN_LINES:]
    ended = [] if code is None else [f"exit code {code}"]
    return [*ended, *(scrubbed(line).strip() for line in lines)]


def _last_line(printed: str) -> Figures:
    figures: Figures = json.loads(printed.strip().splitlines()[-1])
    return figures


def _ran_stages(printed: str) -> Figures:
    return {"stages that ran": float(len(re.findall(r"^passed ", printed, re.MULTILINE)))}


def _of_run(output: Path) -> Figures:
    """Seconds and peak memory of each stage of the only run in a folder."""
    (folder,) = (output / "runs").iterdir()
    figures: Figures = {}
    for name, entry in RunRecord.read(folder).stages.items():
        if entry.seconds is not None:
            figures[f"{name}, seconds"] = round(entry.seconds, 1)
        manifest = Path(entry.artifact) / "manifest.json"
        if entry.artifact and manifest.is_file():
            peak = json.loads(manifest.read_text(encoding="utf-8"))["usage"].get("peak_gpu_bytes")
            if peak is not None:
                figures[f"{name}, peak GB on the card"] = round(peak / 1e9, 2)
    return figures
