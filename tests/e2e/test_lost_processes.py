"""A process that is killed or stuck ends the run, and is named with what it was about."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from tests.e2e.conftest import Align, environment
from tests.living import descendants_of, wait_until, words_of

TWO = ("launch.num_processes=2", "stages.sft.optim={batch_size: 4, micro_batch_tokens: 60, epochs: 500, lr: 1e-3}")
"""Training that would go on for minutes."""


@pytest.fixture
def align(new_align: Callable[[], Align]) -> Align:
    return replace(new_align(), recipe="sft_dpo")


@contextmanager
def _running(align: Align, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        align.argv("run", *TWO, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _worker(driver: subprocess.Popen[str], align: Align, rank: int) -> psutil.Process:
    """The process of that rank, once the first steps are logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert driver.poll() is None, f"it ended by itself\n{align.logs()}"
        logged = [path.read_text() for path in align.output.glob("artifacts/sft-*.work/content/metrics.jsonl")]
        workers = [process for process in descendants_of(driver.pid) if _is_worker(process, rank)]
        if logged and logged[0] and workers:
            return workers[0]
        time.sleep(0.2)
    raise AssertionError(f"no step in two minutes\n{align.logs()}")


def _is_worker(process: psutil.Process, rank: int) -> bool:
    try:
        return "alignment.worker" in process.cmdline() and process.environ().get("RANK") == str(rank)
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, "process 1 ended by signal 9"),
        (signal.SIGSTOP, "process 1 of 2 has not run for 12 seconds: "),
    ],
)
def test_a_lost_process_is_named(align: Align, number: signal.Signals, expected: str) -> None:
    with _running(align, "launch.hang_seconds=12") as driver:
        os.kill(_worker(driver, align, rank=1).pid, number)
        printed, _ = driver.communicate(timeout=60)
    assert driver.returncode == 5, printed
    assert expected in printed, printed
    assert "→" in printed, "and a remedy"
    wait_until(lambda: not any(str(align.output) in " ".join(words_of(process)) for process in psutil.process_iter()))
