"""Opens files so that no content can fill the memory or keep a reader busy forever. The limits lie far above what a
model can read: a row of 16 MiB is some million tokens. docs/data.md lists them."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignment.core.errors import DataError
from alignment.core.files import refuse_endless

LINE_BYTES = 16 << 20
"""Limit for a line of JSON, or (in characters) for a line or a field of CSV."""
WHOLE_BYTES = 1 << 30
"""Limit for a JSON file, which is read whole, and for 1,000 rows of Parquet, unpacked."""
RATIO = 200
"""How many times its size a packed file may unpack to; rows of text pack to between a third and a twentieth."""
ALWAYS_BYTES = 64 << 20
"""Bytes that any packed file may unpack to, however small it is."""
LEVELS = 100
"""How deep lists and objects may be nested."""
_BLOCK = 1 << 20
_SPLIT = "write shorter rows; split the text into several"


def opened(path: Path) -> BinaryIO:
    """A stream of the file's bytes, unpacked if its name ends in ``.gz``. Raises DataError: it is not a regular file.
    While it is read: it unpacks to far more than its size suggests."""
    refuse_endless(path)
    if path.suffix != ".gz":
        return path.open("rb")
    return cast("BinaryIO", io.BufferedReader(_Unpacked(path), buffer_size=1 << 16))


class _Unpacked(io.RawIOBase):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = gzip.open(path)  # noqa: SIM115 - close() closes it
        self._left = max(ALWAYS_BYTES, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"unpacks to more than {RATIO} times its size, which is not plausible for text",
                where=str(self._path),
                remedy="check its content; if it is correct, unpack it (gunzip) and give the unpacked file",
            )
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


def lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, bytes | DataError]]:
    """Yields the location of each line with the line, or with an error if it is too long to be held in memory."""
    number = 0
    while line := stream.readline(LINE_BYTES + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) <= LINE_BYTES:
            yield where, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LINE_BYTES)
        yield where, DataError(f"is longer than {_mebibytes(LINE_BYTES)}", where=where, remedy=_SPLIT)


def text_lines(text: io.TextIOBase, path: Path) -> Iterator[str]:
    """Yields the lines of a text. Raises DataError: a line is too long."""
    number = 0
    while line := text.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise DataError(f"is longer than {_mebibytes(LINE_BYTES)}", where=f"{path}:{number}", remedy=_SPLIT)
        yield line


def whole(stream: BinaryIO, path: Path) -> bytes:
    """The whole content. Raises DataError: the content and its parsed values would be too large for the memory."""
    blocks, count = [], 0
    while block := stream.read(_BLOCK):
        blocks.append(block)
        count += len(block)
        if count > WHOLE_BYTES:
            raise DataError(
                f"is longer than {_mebibytes(WHOLE_BYTES)}, and a JSON list must be read in one piece",
                where=str(path),
                remedy="write it as JSON Lines (.jsonl), which are read line by line",
            )
    return b"".join(blocks)


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than ``LEVELS``."""
    level = [value]
    for _ in range(LEVELS + 1):
        groups = [item for item in level if isinstance(item, (dict, list))]
        level = [item for group in groups for item in (group.values() if isinstance(group, dict) else group)]
        if not groups:
            return False
    return True


def _mebibytes(count: int) -> str:
    return f"{count >> 20:,} MiB" if count >= 1 << 20 else f"{count:,} bytes"
