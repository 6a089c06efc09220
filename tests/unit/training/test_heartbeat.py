"""Signs of life: work is seen as work, waiting as waiting, and where it happens."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.records.worker import Heartbeat
from alignment.training import heartbeat
from alignment.training.heartbeat import HeartbeatWriter, ProcessorTime, activity


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD", 0.25)
    monkeypatch.setattr(heartbeat, "IDLE", 0.5)  # looking so often takes some of the processor itself


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[Callable[[HeartbeatWriter, threading.Event], None]], Any]]:
    """Watches a thread that runs a function for two seconds; gives the last sign."""
    over = threading.Event()
    threads = []

    def watch(work: Callable[[HeartbeatWriter, threading.Event], None]) -> Any:
        writer = HeartbeatWriter(phase="training")

        def run() -> None:
            writer.start(tmp_path, 3)
            work(writer, over)

        threads.append(threading.Thread(target=run))
        threads[0].start()
        time.sleep(2.0)
        return Heartbeat.read_all(tmp_path)[3]

    yield watch
    over.set()
    threads[0].join()


def test_a_thread_that_waits_has_done_nothing_since(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "processor_seconds", lambda process: ProcessorTime())  # else that of pytest, too
    sign = watched(lambda _, over: over.wait())
    assert sign.time - sign.since > 1.0
    assert sign.phase == "training"
    assert "threading.py" in sign.location
    assert not sign.waits


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_processor_that_is_busy_is_work_unless_a_gpu_may_be_waited_for(
    watched: Any, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    """A host that waits for a GPU spins, inside one call."""
    looks = itertools.count(1)
    monkeypatch.setattr(heartbeat, "call_stack", lambda frame: [("trainer.py", 7, "step")])
    monkeypatch.setattr(heartbeat, "processor_seconds", lambda process: ProcessorTime(own=0.2 * next(looks)))

    def compute(writer: HeartbeatWriter, over: threading.Event) -> None:
        writer.on_gpu = on_gpu
        over.wait()

    sign = watched(compute)
    assert (sign.time > sign.since) is on_gpu
    assert sign.waits is on_gpu


def test_what_a_function_held_is_free_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that the watching thread kept would keep its variables too, such as the activations of a pass."""
    heartbeats = heartbeat.heartbeat_file(tmp_path, 3)
    monkeypatch.setattr(heartbeat, "PERIOD", 30.0)
    held: list[weakref.ref[set[int]]] = []

    def hold() -> None:
        activations = {1}
        held.append(weakref.ref(activations))
        while not heartbeats.exists():
            time.sleep(0.01)

    HeartbeatWriter().start(tmp_path, 3)
    hold()
    assert held[0]() is None


def test_processor_seconds_are_those_of_the_process() -> None:
    """However long they take by the clock, beside other work."""
    process = psutil.Process()
    before, end = heartbeat.processor_seconds(process), time.process_time() + 0.2
    while time.process_time() < end:
        hashlib.sha256(bytes(1 << 20))
    assert heartbeat.processor_seconds(process).since(before).own > 0.1


SOMEWHERE, COLLECTIVE = [("trainer.py", 7, "step")], [("/site-packages/torch/distributed/c10d.py", 1, "all_reduce")]


@pytest.mark.parametrize(
    ("stack", "used", "on_gpu", "works", "waits"),
    [
        (SOMEWHERE, ProcessorTime(own=0.25), False, True, False),
        (SOMEWHERE, ProcessorTime(own=0.25), True, False, True),
        (SOMEWHERE, ProcessorTime(started=0.25), True, True, False),  # rows made by processes of its own
        (SOMEWHERE, ProcessorTime(), True, False, False),
        (COLLECTIVE, ProcessorTime(own=0.25), False, False, True),
        (COLLECTIVE, ProcessorTime(started=0.25), False, False, True),
    ],
)
def test_the_processor_says_nothing_of_who_may_spin(
    stack: Any, used: ProcessorTime, on_gpu: bool, works: bool, waits: bool
) -> None:
    assert activity(stack, used, on_gpu=on_gpu) == (works, waits)


def test_progress_that_is_told_is_work(watched: Any) -> None:
    def tell(writer: HeartbeatWriter, over: threading.Event) -> None:
        def count() -> None:
            while not over.wait(0.2):
                writer.reports += 1

        threading.Thread(target=count).start()
        over.wait()

    sign = watched(tell)
    assert sign.time - sign.since < 1.0
