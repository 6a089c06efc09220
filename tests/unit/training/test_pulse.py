"""Signs of life: work is seen as work, waiting as waiting, and where it happens."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.training import pulse
from alignment.training.pulse import Pulse


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "PERIOD", 0.25)
    monkeypatch.setattr(pulse, "IDLE", 0.5)  # looking so often takes some of the processor itself


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[Callable[[Pulse, threading.Event], None]], Any]]:
    """Watches a thread that runs a function for two seconds; gives the last sign."""
    over = threading.Event()
    threads = []

    def watch(work: Callable[[Pulse, threading.Event], None]) -> Any:
        one = Pulse(phase="training")

        def run() -> None:
            one.start(tmp_path, 3)
            work(one, over)

        threads.append(threading.Thread(target=run))
        threads[0].start()
        time.sleep(2.0)
        return json.loads((tmp_path / "3.json").read_text())

    yield watch
    over.set()
    threads[0].join()


def test_a_thread_that_waits_has_done_nothing_since(watched: Any) -> None:
    sign = watched(lambda _, over: over.wait())
    assert sign["time"] - sign["since"] > 1.0
    assert sign["phase"] == "training"
    assert "threading.py" in sign["place"]
    assert not sign["waits"]


def test_a_thread_that_computes_is_at_work(watched: Any) -> None:
    def compute(_: Pulse, over: threading.Event) -> None:
        while not over.is_set():
            sum(range(1000))

    sign = watched(compute)
    assert sign["time"] - sign["since"] < 1.0


def test_progress_that_is_told_is_work(watched: Any) -> None:
    def tell(one: Pulse, over: threading.Event) -> None:
        def count() -> None:
            while not over.wait(0.2):
                one.told += 1

        threading.Thread(target=count).start()
        over.wait()

    sign = watched(tell)
    assert sign["time"] - sign["since"] < 1.0
