"""Results of other machines, which a shared file system may show late."""

from __future__ import annotations

import time
from pathlib import Path

from alignment.core.artifacts import read_manifest

_SHOWN_LATE_SECONDS = 60.0
"""Time within which a shared file system shows here what another machine has written."""
_POLL_SECONDS = 5.0


def is_shown(artifact: Path) -> bool:
    """Whether a result is there that another machine says it has made; waits for it for a while."""
    deadline = time.monotonic() + _SHOWN_LATE_SECONDS
    while read_manifest(artifact) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
