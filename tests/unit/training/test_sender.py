"""The thread that sends to a server: in order, again after a fault, and never longer than its time at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignment.training.trackers import mlflow
from alignment.training.trackers.mlflow import NotSentError, Sender
from alignment.training.trackers.tracker import Row, Tracker


class _Server(Tracker):
    """Stores what it gets; it fails as often as it is told to, and waits for ``open``."""

    def __init__(self, *faults: Exception) -> None:
        self.stored: list[Any] = []
        self.faults = list(faults)
        self.open = threading.Event()
        self.open.set()

    def _store(self, *values: Any) -> None:
        self.open.wait()
        if self.faults:
            raise self.faults.pop(0)
        self.stored += values

    def log(self, rows: Sequence[Row]) -> None:
        self._store(*(row.step for row in rows))

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self._store(name)

    def result(self, manifest: Any, folder: Path) -> None:
        self._store("result")

    def close(self, *, done: bool) -> None:
        self._store(f"done={done}")


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow, "_FIRST_DELAY", 0.01)


def _rows(*steps: int) -> list[Row]:
    return [Row(step=step, curves={"loss": 1.0}, time=0.0) for step in steps]


def _sender(server: _Server, **changes: Any) -> Sender:
    return Sender(
        "MLflow at http://x", lambda: server, may_pass=lambda error: isinstance(error, ConnectionError), **changes
    )


def test_what_failed_is_sent_again_in_order_and_an_outage_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    server = _Server(ConnectionError("no route"), ConnectionError("no route"))
    with caplog.at_level(logging.WARNING):
        sent = _sender(server)
        sent.log(_rows(1, 2))
        sent.log(_rows(3))
        sent.table("samples", ["a"], [["b"]])
        deadline = time.monotonic() + 10
        while "samples" not in server.stored and time.monotonic() < deadline:
            time.sleep(0.01)
        sent.close(done=True)
    assert server.stored == [1, 2, 3, "samples", "done=True"]
    outage = (
        "MLflow at http://x cannot be reached. The stage continues, its steps are in metrics.jsonl, and sending will "
        "be retried: "
    )
    assert [record.getMessage() for record in caplog.records] == [
        outage + "no route",
        "MLflow at http://x is answering again",
    ]


def test_the_end_of_a_stage_waits_for_no_server_that_does_not_answer() -> None:
    server = _Server(*(ConnectionError("no route") for _ in range(1000)))
    sent = _sender(server, end_seconds=10)
    sent.log(_rows(4, 5, 6))
    begun = time.monotonic()
    with pytest.raises(
        NotSentError, match=r"^MLflow at http://x is missing steps 4 to 6 and everything after them: no route$"
    ):
        sent.close(done=True)
    assert time.monotonic() - begun < 5


def test_the_end_of_a_stage_waits_no_longer_than_its_time_for_a_server_that_hangs() -> None:
    server = _Server()
    server.open.clear()
    sent = _sender(server, end_seconds=1.0)
    begun = time.monotonic()
    sent.log(_rows(1))
    assert time.monotonic() - begun < 0.5, "a training does not wait at all"
    with pytest.raises(
        NotSentError, match=r"is missing steps 1 to 1 and everything after them: not sent within 1 seconds$"
    ):
        sent.close(done=True)
    assert time.monotonic() - begun < 5
    server.open.set()


def test_a_fault_that_stays_ends_the_sending() -> None:
    server = _Server(PermissionError("wrong password"))
    sent = _sender(server)
    sent.log(_rows(1))
    sent._thread.join(5)
    with pytest.raises(NotSentError, match=r"^MLflow at http://x refused: wrong password$"):
        sent.log(_rows(2))
    assert server.stored == []
