"""Files that a person wrote, such as a recipe or a template: read whole, and refused if they are too large for that."""

from __future__ import annotations

import stat
from pathlib import Path

from alignment.core.errors import DataError

MOST_BYTES = 1 << 20


def refuse_endless(path: Path) -> None:
    """Accepts a regular file, a link to one, or a path that does not exist.

    Raises:
        DataError: the path is a pipe, a socket or a device, which may never end.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise DataError(
            "is not a regular file", where=str(path), remedy="copy its content to a regular file and name that one"
        )


def small_text(path: Path) -> str:
    """The text of the file.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read.
        DataError: it is not a regular file, or is too large.
    """
    refuse_endless(path)
    with path.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise DataError(f"is longer than {MOST_BYTES >> 20} MiB", where=str(path), remedy="is it the right file?")
    return content.decode()
