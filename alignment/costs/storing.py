"""How long results and checkpoints take to store on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

from alignment.core.fingerprint import file_sha256

PIECE_BYTES, PIECES = 64 << 20, 4
"""What is written to measure the rate. A disk that takes 64 MB at once is often slower from then on."""


def seconds_a_byte(folder: Path) -> float:
    """Seconds for a byte in a file of ``folder``: it is written, and read again for the file's hash."""
    path = folder / "written"
    content = os.urandom(PIECE_BYTES)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(PIECES):
                file.write(content)
            os.fsync(file.fileno())
        file_sha256(path)
        return (time.perf_counter() - began) / (PIECE_BYTES * PIECES)
    finally:
        path.unlink(missing_ok=True)
