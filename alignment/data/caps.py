"""Files opened so that none can fill the memory or never end, whatever somebody put into it.

The bounds lie far above what a model can read: a row of 16 MiB is some million tokens. docs/data.md lists them.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignment.core.errors import DataError
from alignment.core.small_files import refuse_endless

LINE_BYTES = 16 << 20
"""Of a line of JSON, or (as characters) of a line or a field of CSV."""
WHOLE_BYTES = 1 << 30
"""Of a JSON file, which is read whole, and of what 1,000 rows of Parquet hold unpacked."""
RATIO = 200
"""How many times its size a packed file may give; rows of text pack to a third, or to a twentieth."""
ALWAYS_BYTES = 64 << 20
"""What any packed file may give, however small it is."""
LEVELS = 100
"""How deep lists and objects may lie in one another."""
_PART = 1 << 20
_SPLIT = "write shorter rows: cut the text into several"


def opened(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: it is no regular file. While it is read: it unpacks to more than its size lets expect.
    """
    refuse_endless(path)
    if path.suffix != ".gz":
        return path.open("rb")
    return cast("BinaryIO", io.BufferedReader(_Unpacked(path), buffer_size=1 << 16))


class _Unpacked(io.RawIOBase):
    """A gzip file that is refused once it has given too much."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = gzip.open(path)  # noqa: SIM115 - close() closes it
        self._left = max(ALWAYS_BYTES, RATIO * path.stat().st_size)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes."""
        count = self._stream.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataError(
                f"unpacks to more than {RATIO} times its size, as no rows of text do",
                where=str(self._path),
                remedy="look what is in it; if it is right, unpack it (gunzip) and give the file itself",
            )
        return count

    def close(self) -> None:
        """Closes the file too."""
        self._stream.close()
        super().close()


def lines(stream: BinaryIO, path: Path) -> Iterator[tuple[str, bytes | DataError]]:
    """Where each line stands, and the line, or the fault that it is too long; such a one is not held in memory."""
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
    """The lines of a text.

    Raises:
        DataError: one is too long.
    """
    number = 0
    while line := text.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise DataError(f"is longer than {_mebibytes(LINE_BYTES)}", where=f"{path}:{number}", remedy=_SPLIT)
        yield line


def whole(stream: BinaryIO, path: Path) -> bytes:
    """All that there is.

    Raises:
        DataError: that is too much to be held in memory, with the values that it stands for.
    """
    parts, count = [], 0
    while part := stream.read(_PART):
        parts.append(part)
        count += len(part)
        if count > WHOLE_BYTES:
            raise DataError(
                f"is longer than {_mebibytes(WHOLE_BYTES)}, and a JSON list is read whole",
                where=str(path),
                remedy="write it as JSON Lines (.jsonl), which are read one by one",
            )
    return b"".join(parts)


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie deeper than ``LEVELS`` in one another."""
    level = [value]
    for _ in range(LEVELS + 1):
        groups = [item for item in level if isinstance(item, (dict, list))]
        level = [item for group in groups for item in (group.values() if isinstance(group, dict) else group)]
        if not groups:
            return False
    return True


def _mebibytes(count: int) -> str:
    return f"{count >> 20:,} MiB" if count >= 1 << 20 else f"{count:,} bytes"
