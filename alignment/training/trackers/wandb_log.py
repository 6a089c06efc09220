"""Reading W&B's transaction log, the ``run-<id>.wandb`` file that it writes on this machine.

The file is one of LevelDB's logs (blocks of 32 KiB; pieces with a checksum, a length and a kind each) after a header of
seven bytes; a record is a message of W&B's own protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _PIECE, _BLOCK = 7, 7, 1 << 15
_MAGIC = b":W&B"
_WHOLE, _FIRST, _LAST = 1, 2, 4


def records(file: Path) -> Iterator[Any]:
    """The records of a file in order, up to where a process that was killed has cut it off."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    if not data.startswith(_MAGIC):
        return
    place, message = _HEADER, b""
    while place + _PIECE <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _PIECE:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        piece = data[place + _PIECE : place + _PIECE + length]
        if kind == 0 or len(piece) < length:
            return
        message = piece if kind in (_WHOLE, _FIRST) else message + piece
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(message)
        place += _PIECE + length


def last_step(folder: Path, run_id: str) -> int:
    """The last step that the files below ``folder`` hold of a run, 0 if there is none."""
    files = folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    steps = (record.history.step.num for file in files for record in records(file) if record.HasField("history"))
    return max(steps, default=0)
