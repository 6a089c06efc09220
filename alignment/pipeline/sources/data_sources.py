"""Data from outside: files, or a data set of a hub.

As with models, planning reads only what is on this machine; only ``fetch`` downloads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignment.core.errors import DataError
from alignment.data.source_files import content_of, locate
from alignment.pipeline.sources import hub
from alignment.pipeline.sources.model_sources import remembered_sha256

_PATTERNS = ("README.md", "*.json", "*.json.*", "*.jsonl", "*.jsonl.*", "*.csv", "*.csv.*", "*.tsv", "*.parquet")
"""Files that are downloaded: descriptions of splits, and data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """Data for a plan. ``identity`` represents its content in a fingerprint. ``path`` is None for a hub's data set that
    is not on this machine yet; its ``identity`` then names the requested revision. A snapshot is not ``complete`` if
    its list of files is unknown, such as after another program fetched some files of the repository."""

    source: str
    identity: str
    path: Path | None
    complete: bool = True

    @property
    def is_hub(self) -> bool:
        """Whether the data is from a hub."""
        return self.source.startswith("hub:")


def resolve(source: str, *, where: str, recipe_folder: Path | None = None) -> DataSource:
    """Looks data up without downloading anything. ``recipe_folder`` is where the recipe is that names the source.
    Raises DataError: the source has an unknown form, or there is no readable file."""
    if source.startswith("hub:"):
        return _hub(source, where=where, download=False)
    path = locate(source, where=where, recipe_folder=recipe_folder)
    return DataSource(source=source, identity=content_of(path, remembered_sha256), path=path)


def fetch(data: DataSource, *, announce: Callable[[str], None]) -> DataSource:
    """The same data, on this machine. Raises DataError: it cannot be fetched; the error gives the reason and a
    remedy."""
    if data.complete:
        return data
    announce(f"downloading the data set {data.source.removeprefix('hub:')} from its hub")
    fetched = _hub(data.source, where="data.source", download=True)
    if not fetched.complete:
        announce(f"{fetched.identity}: its hub cannot be reached, so some of its files may be missing here")
    return fetched


def _hub(source: str, *, where: str, download: bool) -> DataSource:
    repository = hub.repository(source, kind="dataset")
    if repository is None:
        raise DataError(f"{source!r} does not name a data set", where=where, remedy="write hub:ORG/NAME@REVISION")
    folder = hub.snapshot(repository, patterns=_PATTERNS, download=download, failure=DataError)
    if folder is None:
        return DataSource(source=source, identity=repository.named, path=None, complete=False)
    return DataSource(source=source, identity=content_of(folder), path=folder, complete=hub.is_listed(repository))
