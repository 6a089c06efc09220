"""Files that a person wrote, such as a recipe or a template: read whole, and refused where they cannot be that."""

from __future__ import annotations

import stat
from pathlib import Path

from alignment.core.errors import DataError

MOST_BYTES = 1 << 20


def refuse_endless(path: Path) -> None:
    """Does nothing to a regular file, a link to one, or what is not there.

    Raises:
        DataError: it is a pipe, a socket or a device, which may never end.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise DataError("is no regular file", where=str(path), remedy="copy what it gives to a file, and name that")


def small_text(path: Path) -> str:
    """The text of the file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        DataError: it is no regular file, or too large to be that.
    """
    refuse_endless(path)
    with path.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise DataError(f"is longer than {MOST_BYTES >> 20} MiB", where=str(path), remedy="is it the right file?")
    return content.decode()
