"""How long results and checkpoints take to store on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from alignment.core.fingerprint import file_sha256

WRITTEN_BYTES = 64 << 20
"""Bytes that are written to measure the rate."""


def seconds_a_byte(folder: Path) -> float:
    """Seconds for a byte in a file of ``folder``: it is written, and read again for the file's hash."""
    path = folder / "written"
    content = os.urandom(WRITTEN_BYTES)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        file_sha256(path)
        return (time.perf_counter() - began) / WRITTEN_BYTES
    finally:
        path.unlink(missing_ok=True)
