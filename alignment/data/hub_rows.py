"""Rows of a hub's data set, read from its snapshot on this machine by ``datasets``, which knows what its splits and
subsets are. Nothing of the repository is run, and nothing is downloaded here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from os.path import normpath
from pathlib import Path
from typing import Any

from yaml import YAMLError

from alignment.config.data import SourceConfig
from alignment.core.errors import DataError
from alignment.core.fingerprint import content_sha256
from alignment.data.row_files import RawRow, Unparsed, parsed, unparsed_rows_of

_FOLDER = "datasets--"


def source_rows(path: Path, data: SourceConfig) -> Iterator[RawRow | DataError]:
    """The rows at ``path``: of a snapshot those of the split that ``data`` names, else those of its files.

    Raises:
        DataError: see ``hub_rows`` and ``rows_of``.
    """
    return map(parsed, unparsed_source_rows(path, data))


def unparsed_source_rows(path: Path, data: SourceConfig) -> Iterator[Unparsed]:
    """As ``source_rows``, with lines of JSON in files of the user's as they stand there (``unparsed_rows_of``)."""
    return unparsed_rows_of(path) if snapshot_name(path) is None else hub_rows(path, data.split, data.subset)


def snapshot_name(path: Path) -> str | None:
    """``hub:ORG/NAME@COMMIT`` of a data set's snapshot in a hub's cache, which the folders' names tell; None of any
    other path."""
    commit, snapshots, repository = path.name, path.parent.name, path.parent.parent.name
    if snapshots != "snapshots" or not repository.startswith(_FOLDER):
        return None
    return f"hub:{repository.removeprefix(_FOLDER).replace('--', '/')}@{commit}"


def content_of(path: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """What a fingerprint holds of the data at ``path``: a snapshot's name, since a commit never changes, else the
    SHA-256 of its content (``content_sha256``)."""
    return snapshot_name(path) or content_sha256(path, of_file)


def hub_rows(folder: Path, split: str, subset: str | None) -> Iterator[RawRow]:
    """The rows of a snapshot in order, each at ``hub:ORG/NAME@COMMIT SPLIT: row NUMBER``; numbers begin at 1.

    Raises:
        DataError: there is no such split or subset (it says which there are), or ``datasets`` cannot read the files.
    """
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    name = snapshot_name(folder) or str(folder)
    place = " ".join(filter(None, (name, subset, split)))
    number = 0
    try:
        for number, row in enumerate(_rows_of_split(folder, split, subset, where=name), start=1):
            yield RawRow(where=f"{place}: row {number}", value=dict(row))
    except (*_RAISED, ArrowException, DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f"{place}, behind row {number}" if number else place
        raise DataError(f"cannot be read: {reason}", where=where, remedy=_REMEDY) from error


def _rows_of_split(folder: Path, split: str, subset: str | None, *, where: str) -> Iterable[Mapping[str, Any]]:
    from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset_builder

    known = get_dataset_config_names(str(folder))
    chosen = get_dataset_default_config_name(str(folder)) if subset is None else subset
    if chosen not in known:
        missing = "has several subsets:" if chosen is None else f"has no subset '{chosen}'; it has"
        raise DataError(f"{missing} {', '.join(known)}", where=where, remedy="choose one with data.subset=NAME")
    builder = load_dataset_builder(str(folder), name=chosen)
    files = {str(name): list(paths) for name, paths in builder.config.data_files.items()}
    if split not in files:
        missing = f"has no split '{split}'; it has {', '.join(files)}"
        raise DataError(missing, where=where, remedy="choose one with data.split=NAME")
    _refuse_files_elsewhere(files[split], folder, where=where)
    rows: Iterable[Mapping[str, Any]] = builder.as_streaming_dataset(split=split)  # makes no second copy on disk
    return rows


def _refuse_files_elsewhere(files: Iterable[str], folder: Path, *, where: str) -> None:
    """A repository's description may name files of any place; the commit would not stand for what they hold.

    Raises:
        DataError: one lies outside the snapshot.
    """
    for file in files:
        if not any(Path(normpath(file)).is_relative_to(root) for root in (folder, folder.resolve())):
            raise DataError(f"names a file outside of the repository: {file}", where=where, remedy=_REMEDY)


_RAISED = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError),
    *(zlib.error, YAMLError),
)
"""What ``datasets`` and the readers below it raise at files and descriptions that they cannot use, beside kinds of
their own. Not all exceptions: one asks the stage to stop."""
_REMEDY = "only JSON, CSV and Parquet files are read, never scripts; if there are some, give them by path:FOLDER"
