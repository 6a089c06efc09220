"""One machine works on a stage at a time; a lease that nobody renews is taken over."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from alignment.core.errors import Busy
from alignment.pipeline.remote import lease
from alignment.pipeline.remote.lease import leased
from alignment.pipeline.remote.object_store import ObjectStore

KEY = "checkpoints/abc/lease.json"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE", 0.6), ("RENEW", 0.1), ("SETTLE", 0.05), ("POLL", 0.05)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """The work folders of one stage on two machines."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    return tmp_path / "first", tmp_path / "second"


def take(
    store: ObjectStore, work: Path, *, wait: bool = False, announce: Callable[[str], None] = lambda text: None
) -> ExitStack:
    """Holds the lease until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(leased(store, "checkpoints/abc", work=work, wait=wait, announce=announce))
    return stack


def abandon(store: ObjectStore, work: Path) -> None:
    """Leaves a lease as a machine that is lost does."""
    with take(store, work):
        content = store.read(KEY)
    assert content is not None
    store.write(KEY, content)


def test_a_second_machine_is_refused_while_the_first_renews(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    with take(store, machines[0]):
        time.sleep(0.9)  # longer than a lease lasts
        with pytest.raises(Busy, match=r"in use by process \d+ on .*renewed its lease 0 s ago") as refused:
            take(store, machines[1])
        assert "--wait" in str(refused.value)
    assert store.read(KEY) is None, "it was given back"
    with take(store, machines[1]):
        pass


def test_one_that_waits_gets_the_lease_when_it_is_free(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    first, announcements = take(store, machines[0]), list[str]()

    def announce(text: str) -> None:
        announcements.append(text)
        first.close()  # it is free only once somebody waits for it

    with take(store, machines[1], wait=True, announce=announce):
        pass
    assert len(announcements) == 1
    assert "is working on it; waiting" in announcements[0]


def test_a_lost_machine_s_lease_is_taken_once_it_is_old(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    abandon(store, machines[0])
    with pytest.raises(Busy):
        take(store, machines[1])
    time.sleep(0.7)
    with take(store, machines[1]), pytest.raises(Busy):
        take(store, machines[0])


def test_the_folder_that_had_the_lease_goes_on_at_once(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    abandon(store, machines[0])
    with take(store, machines[0]):
        pass


def test_a_machine_notices_that_another_has_taken_over(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    with leased(store, "checkpoints/abc", work=machines[0], wait=False, announce=lambda _: None) as held:
        store.write(KEY, json.dumps({"owner": "another", "host": "b", "process": 7}).encode())
        assert held.lost.wait(2)
    content = store.read(KEY)
    assert content is not None, "the other machine's lease stays"
    assert json.loads(content)["owner"] == "another"


def _by_turns(write: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.Lock()

    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return write(*args, **kwargs)

    return locked


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "not atomic"])
def test_of_many_at_once_one_gets_it(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    store._refuses_existing = atomic
    if atomic:  # fsspec's memory looks for an object and then writes it, and a thread may do so in between
        monkeypatch.setattr(store._files, "pipe_file", _by_turns(store._files.pipe_file))
    holders, refused = list[ExitStack](), list[Busy]()

    def attempt(number: int) -> None:
        work = tmp_path / str(number)
        work.mkdir()
        try:
            holders.append(take(store, work))
        except Busy as busy:
            refused.append(busy)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(holders), len(refused)) == (1, 5)
    holders[0].close()
