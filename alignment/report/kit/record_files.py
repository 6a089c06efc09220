"""Reads records as far as their files can be understood, with text and numbers cleaned for a page."""

from __future__ import annotations

from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.typed_json import Cleaning, NewerVersion, Record
from alignment.report.kit import text


def _drawable(number: float) -> float | None:
    return None if text.finite(number) is None else number


FOR_A_PAGE = Cleaning(prose=text.prose, line=text.name, name=text.path_end, number=_drawable)


def shown(path: Path, kind: type[Record]) -> tuple[Record | None, str]:
    """The record in a file, cleaned for a page, or None with the reason in words."""
    try:
        record = typed_json.read_parts(path, kind, FOR_A_PAGE)
    except NewerVersion:
        return None, f"The file {path.name} was written by a newer version and is not shown."
    except (ArtifactError, OSError):
        record = None
    return record, "" if record is not None else f"The file {path.name} cannot be read."
