"""Reads W&B's transaction log, the ``run-<id>.wandb`` file that it writes on this machine.

The file is a LevelDB log (blocks of 32 KiB with chunks, each with a checksum, a length and a kind) after a header of
seven bytes; a record is a message of W&B's own protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _CHUNK, _BLOCK = 7, 7, 1 << 15
_MAGIC = b":W&B"
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """The records of a file in order, up to the point where a killed process stopped writing."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    if not data.startswith(_MAGIC):
        return
    offset, message = _HEADER, b""
    while offset + _CHUNK <= len(data):
        if (left := _BLOCK - offset % _BLOCK) < _CHUNK:
            offset += left
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        chunk = data[offset + _CHUNK : offset + _CHUNK + length]
        if kind == 0 or len(chunk) < length:
            return
        message = chunk if kind in (_WHOLE, _FIRST) else message + chunk
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(message)
        offset += _CHUNK + length


def logged(folder: Path, run_id: str) -> tuple[int, set[str]]:
    """The last step of a run in the files below ``folder``, or 0 if there is none, and the names that it has."""
    step, names = 0, set()
    for file in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for record in records(file):
            if record.HasField("history"):
                step = max(step, record.history.step.num)
                names |= {item.nested_key[0] if item.nested_key else item.key for item in record.history.item}
    return step, names
