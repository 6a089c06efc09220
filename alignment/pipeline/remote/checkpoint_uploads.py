"""Uploads the checkpoints of a running stage in a thread, so that another machine can continue it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from alignment.core.errors import ArtifactError, StoreError
from alignment.pipeline.remote.lease import Lease
from alignment.pipeline.remote.remote_checkpoints import RemoteCheckpoints, local_work, nothing

_LOOK_SECONDS = 1.0
_AFTER_FAULT_SECONDS = 30.0
_REPLIES_SECONDS = 30.0
"""How long replies of servers wait for an upload while they are all that is new."""


class _Ended(Exception):
    """The stage has ended, so the upload of a checkpoint is no longer needed."""


class CheckpointUploads:
    """While the block runs, each new checkpoint is uploaded. If the block fails, the last one is uploaded before the
    error goes on; if it ends well, the result makes them superfluous.

    A fault of the store does not end the stage: it is announced once, and the upload is tried again later.
    """

    def __init__(
        self, checkpoints: RemoteCheckpoints, work: Path, *, lease: Lease, announce: Callable[[str], None]
    ) -> None:
        self._checkpoints, self._work, self._lease, self._announce = checkpoints, work, lease, announce
        self._uploaded = (0, 0, 0)
        self._uploaded_at = 0.0
        self._ends = threading.Event()
        self._fault = ""
        self._thread = threading.Thread(target=self._upload_all, daemon=True)

    def __enter__(self) -> CheckpointUploads:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._ends.set()
        self._thread.join()
        if kind is not None and not self._lease.lost.is_set():
            self._upload(nothing)

    def _upload_all(self) -> None:
        while not self._ends.wait(_LOOK_SECONDS):
            if self._lease.lost.is_set():
                self._announce(
                    "another machine has taken over the stage, so checkpoints from here are no longer uploaded"
                )
                return
            try:
                if not self._upload(self._refuse_after_end):
                    self._ends.wait(_AFTER_FAULT_SECONDS)
            except _Ended:
                return

    def _upload(self, on_bytes: Callable[[int], None]) -> bool:
        """Uploads how far the stage is, if that is new; returns False after a fault of the store or the disk."""
        here, started = local_work(self._work).progress, time.monotonic()
        if here <= self._uploaded:
            return True
        are_only_replies = here[:2] == self._uploaded[:2]
        if are_only_replies and not self._ends.is_set() and started < self._uploaded_at + _REPLIES_SECONDS:
            return True
        try:
            checkpoint = self._checkpoints.upload_newest(self._work, on_bytes=on_bytes)
        except ArtifactError:  # the stage has removed it, so there is a newer one or the result
            return True
        except (StoreError, OSError) as fault:
            reason = fault.message if isinstance(fault, StoreError) else str(fault)
            if reason != self._fault:
                self._announce(f"a checkpoint could not be uploaded; this will be tried again: {reason}")
            self._fault = reason
            return False
        self._fault = ""
        self._uploaded, self._uploaded_at = here if checkpoint is None else checkpoint.progress, started
        if checkpoint is not None and not are_only_replies:
            self._announce(f"{checkpoint.label} was uploaded in {time.monotonic() - started:.1f} s")
        return True

    def _refuse_after_end(self, _: int) -> None:
        if self._ends.is_set():
            raise _Ended
