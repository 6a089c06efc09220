"""A lease on a stage, so that two machines do not do the same work: an object that its owner writes again and again.

A lease that was not renewed for ``LEASE_SECONDS`` counts as lost, and another machine takes it. Times are those of the
store's clock. Results do not depend on leases: if two machines make the same stage all the same, the first complete one
stays (docs/stores.md lists when that happens).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import ArtifactError, Busy, StoreError
from alignment.core.files import parse_json
from alignment.pipeline.remote.object_store import ObjectStore
from alignment.records.run import LeaseRecord

LEASE_SECONDS = 45.0
RENEW_SECONDS = 10.0
SETTLE_SECONDS = 2.0
"""Pause before a lease that was taken over is read again, in case two machines took it at once."""
POLL_SECONDS = 5.0
OWN_FILE = "lease.json"
"""In the work folder: the owner that this folder was leased by, so that a call after a kill continues at once."""


class Lease:
    """A lease that is held, and renewed until its ``end``: ``lost`` is set once another machine has taken it."""

    def __init__(self, store: ObjectStore, key: str, record: LeaseRecord) -> None:
        self.lost = threading.Event()
        self._store, self._key, self._record = store, key, record
        self._ends = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)
        self._renewing.start()

    def end(self) -> None:
        """Stops renewing, and deletes the lease if it is still this one."""
        self._ends.set()
        self._renewing.join()
        try:
            if not self.lost.is_set() and _read(self._store, self._key) == self._record:
                self._store.delete(self._key)
        except StoreError:
            return  # it runs out by itself

    def _renew(self) -> None:
        while not self._ends.wait(RENEW_SECONDS):
            try:
                if _read(self._store, self._key) not in (None, self._record):
                    self.lost.set()
                    return
                self._store.write(self._key, _content(self._record))
            except StoreError:
                continue  # the next one is due soon


@contextmanager
def leased(
    store: ObjectStore, folder: str, *, work: Path, wait: bool, announce: Callable[[str], None]
) -> Iterator[Lease]:
    """Holds the lease of the stage whose checkpoints are under ``folder`` while the block runs. The caller holds the
    lock in ``work``, so no other process on this machine has the lease. Raises Busy: another machine holds it, and
    ``wait`` is False; StoreError: the store cannot be reached or refuses."""
    key = f"{folder}/lease.json"
    record = LeaseRecord(owner=_owner(work), host=socket.gethostname(), process=os.getpid())
    announced = False
    while not _take(store, folder, key, record):
        holder, age = _read(store, key), _age(store, folder, key)
        if holder is None or age is None:
            continue
        if not wait:
            message = f"in use by process {holder.process} on {holder.host}, which renewed its lease {age:.0f} s ago"
            remedy = f"wait for it with --wait; a lease expires after {LEASE_SECONDS:.0f} s"
            raise Busy(message, where=f"{store.url}/{key}", remedy=remedy)
        if not announced:
            announce(f"process {holder.process} on {holder.host} is working on it; waiting")
            announced = True
        time.sleep(POLL_SECONDS)
    lease = Lease(store, key, record)
    try:
        yield lease
    finally:
        lease.end()


def _take(store: ObjectStore, folder: str, key: str, record: LeaseRecord) -> bool:
    if store.create(key, _content(record)):
        return store.refuses_existing or _settled(store, key, record)
    holder = _read(store, key)
    if holder is not None and holder.owner == record.owner:
        store.write(key, _content(record))
        return True
    age = _age(store, folder, key)
    if holder is None or age is None or age < LEASE_SECONDS:
        return False
    if _read(store, key) == holder:
        store.delete(key)
    return store.create(key, _content(record)) and _settled(store, key, record)


def _settled(store: ObjectStore, key: str, record: LeaseRecord) -> bool:
    time.sleep(SETTLE_SECONDS)
    return _read(store, key) == record


def _age(store: ObjectStore, folder: str, key: str) -> float | None:
    written = store.written(key)
    return None if written is None else (store.now(folder) - written).total_seconds()


def _owner(work: Path) -> str:
    file = work / OWN_FILE
    try:
        return typed_json.read(file, LeaseRecord, remedy="").owner
    except (FileNotFoundError, ArtifactError):
        record = LeaseRecord(owner=secrets.token_hex(16))
        typed_json.write(file, record)
        return record.owner


def _read(store: ObjectStore, key: str) -> LeaseRecord | None:
    content = store.read(key)
    if content is None:
        return None
    try:
        return typed_json.strict(parse_json(content), LeaseRecord, where=f"{store.url}/{key}", remedy="")
    except (ValueError, ArtifactError):
        return LeaseRecord(owner="unreadable")


def _content(record: LeaseRecord) -> bytes:
    return json.dumps(typed_json.to_json(record)).encode()
