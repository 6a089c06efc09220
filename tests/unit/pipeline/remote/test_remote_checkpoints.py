"""Checkpoints in a store: what counts, what another machine gets, what is removed; and who may work on a stage."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment.core.errors import Busy, StoreError
from alignment.pipeline.remote import lease, remote_checkpoints
from alignment.pipeline.remote.lease import leased
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.pipeline.remote.remote_checkpoints import CheckpointUploads, RemoteCheckpoints, local_work, nothing
from tests.living import wait_until
from tests.unit.pipeline.remote.conftest import sealed

FINGERPRINT = "91c0aa17" * 8


@pytest.fixture
def checkpoints(store: ObjectStore) -> RemoteCheckpoints:
    return RemoteCheckpoints(store, FINGERPRINT)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "sft-91c0aa17.work"
    folder.mkdir()
    for name in ("lock", "progress.json", "lease.json", "engine.log"):
        (folder / name).write_text("of this machine alone")
    (folder / "heartbeats").mkdir()
    (folder / "heartbeats" / "0.json").write_text("{}")
    return folder


def download(checkpoints: RemoteCheckpoints, folder: Path) -> list[str]:
    announcements: list[str] = []
    folder.mkdir()
    checkpoints.download_newest(folder, announce=announcements.append)
    return announcements


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_another_machine_gets_all_that_it_needs(checkpoints: RemoteCheckpoints, work: Path, tmp_path: Path) -> None:
    sealed(work, 20)
    sealed(work, 40)
    (work / "micro_batch.json").write_text("{}")
    (work / "checkpoints" / "part-answers-0.json").write_text("answers")
    (work / "checkpoints" / "checkpoint-60").mkdir()  # not sealed
    (work / "scorer_replies").mkdir()
    (work / "scorer_replies" / "0.jsonl").write_text("replies")
    (work / "content" / "model").mkdir()
    (work / "content" / "model" / "weights").write_text("made at the end")
    stored = checkpoints.upload_newest(work, on_bytes=nothing)
    assert stored is not None
    assert (stored.label, stored.progress) == ("checkpoint-40 with servers' replies", (40, 1, len("replies")))

    announcements = download(checkpoints, tmp_path / "other")
    assert files(tmp_path / "other") == {
        "checkpoints/checkpoint-40/weights": "weights 40",
        "checkpoints/checkpoint-40/alignment_checkpoint.json": '{"step": 40}',
        "checkpoints/part-answers-0.json": "answers",
        "content/metrics.jsonl": (work / "content" / "metrics.jsonl").read_text(),
        "micro_batch.json": "{}",
        "scorer_replies/0.jsonl": "replies",
    }
    assert "checkpoint-40 with servers' replies was downloaded from memory://" in announcements[0]
    assert not (work / "upload").exists()


def test_half_an_upload_never_counts(
    checkpoints: RemoteCheckpoints, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed(work, 20)
    checkpoints.upload_newest(work, on_bytes=nothing)
    sealed(work, 40)
    upload = ObjectStore.upload

    def ends(store: ObjectStore, file: Path, key: str, on_bytes: object) -> None:
        if "checkpoint-40/weights" in key:
            raise StoreError("gone", where=key)
        upload(store, file, key, nothing)

    monkeypatch.setattr(ObjectStore, "upload", ends)
    with pytest.raises(StoreError):
        checkpoints.upload_newest(work, on_bytes=nothing)
    assert [stored.label for stored in checkpoints.complete()] == ["checkpoint-20"]
    download(checkpoints, tmp_path / "other")
    assert local_work(tmp_path / "other").step == 20


def test_all_but_the_two_newest_are_removed(checkpoints: RemoteCheckpoints, store: ObjectStore, work: Path) -> None:
    for step in (20, 40, 60):
        sealed(work, step, tokenizer="the same")
        checkpoints.upload_newest(work, on_bytes=nothing)
        shutil.rmtree(work / "checkpoints" / f"checkpoint-{step - 20}", ignore_errors=True)
    assert [stored.label for stored in checkpoints.complete()] == ["checkpoint-60", "checkpoint-40"]
    steps = {key.split("/")[3] for key in store.sizes(checkpoints.folder) if "/checkpoints/checkpoint-" in key}
    assert steps == {"checkpoint-40", "checkpoint-60"}
    logs = [key for key in store.sizes(checkpoints.folder) if "metrics.jsonl" in key]
    assert len(logs) == 2
    checkpoints.remove()
    assert store.sizes(checkpoints.folder) == {}


def test_what_is_further_here_is_not_replaced(checkpoints: RemoteCheckpoints, work: Path, tmp_path: Path) -> None:
    sealed(work, 20)
    checkpoints.upload_newest(work, on_bytes=nothing)
    sealed(tmp_path / "other", 40)
    checkpoints.download_newest(tmp_path / "other", announce=lambda _: None)
    assert local_work(tmp_path / "other").step == 40
    assert not (tmp_path / "other/checkpoints/checkpoint-20").exists()
    assert checkpoints.upload_newest(work, on_bytes=nothing) is None, "nothing new"


def test_a_damaged_checkpoint_is_passed_over_and_named(
    checkpoints: RemoteCheckpoints, store: ObjectStore, work: Path, tmp_path: Path
) -> None:
    for step in (20, 40):
        sealed(work, step)
        checkpoints.upload_newest(work, on_bytes=nothing)
    damaged = next(key for key in store.sizes(checkpoints.folder) if "checkpoint-40/weights" in key)
    store.write(damaged, b"weights 4X")
    announcements = download(checkpoints, tmp_path / "other")
    assert local_work(tmp_path / "other").step == 20
    assert "checkpoint-40 in memory://" in announcements[0]
    assert "cannot be used" in announcements[0]
    assert "checkpoint-20 was downloaded" in announcements[1]


def test_a_foreign_or_damaged_list_does_not_count(
    checkpoints: RemoteCheckpoints, store: ObjectStore, work: Path
) -> None:
    sealed(work, 20)
    checkpoints.upload_newest(work, on_bytes=nothing)
    (listed,) = (key for key in store.sizes(checkpoints.folder) if key.endswith("/00000020-000000.json"))
    content = store.read(listed)
    assert content is not None
    store.write(f"{checkpoints.folder}/00000040-000000.json", content[:-20])
    store.write(f"{checkpoints.folder}/00000060-000000.json", content.replace(b"91c0aa17", b"00000000"))
    assert [stored.label for stored in checkpoints.complete()] == ["checkpoint-20"]


def uploads(
    checkpoints: RemoteCheckpoints, work: Path, announcements: list[str], *, lost: bool = False
) -> CheckpointUploads:
    held: Any = SimpleNamespace(lost=threading.Event())
    if lost:
        held.lost.set()
    return CheckpointUploads(checkpoints, work, lease=held, announce=announcements.append)


def test_a_machine_that_has_lost_its_lease_uploads_nothing(
    checkpoints: RemoteCheckpoints, store: ObjectStore, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_checkpoints, "_LOOK_SECONDS", 0.001)
    announcements: list[str] = []
    sealed(work, 20)
    with uploads(checkpoints, work, announcements, lost=True):
        wait_until(lambda: announcements)
    assert announcements == [
        "another machine has taken over the stage, so checkpoints from here are no longer uploaded"
    ]
    assert store.sizes("") == {}


def test_replies_after_the_last_part_reach_another_machine(
    checkpoints: RemoteCheckpoints, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All answers are stored when a judge is asked, whose replies cost money."""
    monkeypatch.setattr(remote_checkpoints, "_LOOK_SECONDS", 0.001)
    announcements: list[str] = []
    (work / "checkpoints").mkdir()
    (work / "checkpoints" / "part-answers-0.json").write_text("answers")
    with suppress(KeyboardInterrupt), uploads(checkpoints, work, announcements):
        wait_until(lambda: announcements)
        (work / "judgements.work.jsonl").write_text("a reply")
        raise KeyboardInterrupt
    download(checkpoints, tmp_path / "other")
    assert files(tmp_path / "other")["judgements.work.jsonl"] == "a reply"


def test_a_fault_of_the_disk_is_said_once_and_neither_ends_the_uploads_nor_hides_a_stop(
    checkpoints: RemoteCheckpoints, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []

    def full(file: object) -> None:
        tried.append(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote_checkpoints, "file_sha256", full)
    for wait in ("_LOOK_SECONDS", "_AFTER_FAULT_SECONDS"):
        monkeypatch.setattr(remote_checkpoints, wait, 0.001)
    announcements: list[str] = []
    sealed(work, 20)

    def stop() -> None:
        wait_until(lambda: len(tried) >= 2)
        raise KeyboardInterrupt

    # it is not hidden by the fault of the last upload, which leaving the block tries
    with pytest.raises(KeyboardInterrupt), uploads(checkpoints, work, announcements):
        stop()
    assert announcements == [
        "a checkpoint could not be uploaded; this will be tried again: [Errno 28] No space left on device"
    ]


KEY = "checkpoints/abc/lease.json"


@pytest.fixture
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE", 0.6), ("RENEW", 0.1), ("SETTLE", 0.05), ("POLL", 0.05)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def machines(tmp_path: Path, short_times: None) -> tuple[Path, Path]:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    return tmp_path / "first", tmp_path / "second"


def take(
    store: ObjectStore, work: Path, *, wait: bool = False, announce: Callable[[str], None] = lambda text: None
) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(leased(store, "checkpoints/abc", work=work, wait=wait, announce=announce))
    return stack


def abandon(store: ObjectStore, work: Path) -> None:
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
        assert ["is working on it; waiting" in text for text in announcements] == [True]


def test_a_lost_machine_s_lease_is_taken_once_it_is_old(store: ObjectStore, machines: tuple[Path, Path]) -> None:
    abandon(store, machines[0])
    with take(store, machines[0]):
        pass
    abandon(store, machines[0])
    with pytest.raises(Busy):
        take(store, machines[1])
    time.sleep(0.7)
    with take(store, machines[1]), pytest.raises(Busy):
        take(store, machines[0])


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "not atomic"])
def test_of_many_at_once_one_gets_it(
    store: ObjectStore, machines: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    store.refuses_existing = atomic
    write, by_turns = store._files.pipe_file, threading.Lock()

    def write_by_turns(*args: Any, **kwargs: Any) -> None:
        with by_turns:
            write(*args, **kwargs)

    if atomic:  # fsspec's memory looks for an object and then writes it, and a thread may do so in between
        monkeypatch.setattr(store._files, "pipe_file", write_by_turns)
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


def test_a_file_system_without_hard_links_is_no_obstacle(
    checkpoints: RemoteCheckpoints, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    sealed(work, 20)
    checkpoints.upload_newest(work, on_bytes=nothing)
    download(checkpoints, tmp_path / "other")
    assert (tmp_path / "other/checkpoints/checkpoint-20/weights").read_text() == "weights 20"
