"""How the process on the worker's side tells the driver why it ended."""

from __future__ import annotations

import json
from pathlib import Path

from alignment.core.errors import (
    AlignmentError,
    ArtifactError,
    ConfigError,
    DataError,
    DiskError,
    ModelError,
    StageError,
)

_FILE = "error.json"
_KINDS = {kind.exit_code: kind for kind in (ConfigError, DataError, ModelError, StageError, DiskError, ArtifactError)}


def write_error(folder: Path, error: AlignmentError) -> None:
    """Writes an error for the driver."""
    written = {"code": error.exit_code, "message": error.message, "where": error.where, "remedy": error.remedy}
    (folder / _FILE).write_text(json.dumps(written), encoding="utf-8")


def written_error(folder: Path) -> AlignmentError | None:
    """The error that was written, if there was one."""
    file = folder / _FILE
    if not file.is_file():
        return None
    written = json.loads(file.read_text(encoding="utf-8"))
    return _KINDS[written["code"]](written["message"], where=written["where"], remedy=written["remedy"])
