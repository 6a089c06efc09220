"""Where rows come from: files that ship with the project, the user's files, or a data set from a hub, read from its
local snapshot. ``datasets`` reads snapshots, because it knows the splits and subsets. No code of the repository is run,
and nothing is downloaded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from os.path import normpath
from pathlib import Path
from typing import Any

from alignment.config.data import SourceConfig
from alignment.config.faults import nearest, suggestion, with_scheme
from alignment.core.errors import DataError
from alignment.core.files import shipped
from alignment.core.fingerprint import content_sha256
from alignment.data.row_files import RawRow, Unparsed, files_of, parsed, unparsed_rows_of, without_filled


def locate(source: str, *, where: str = "", recipe_folder: Path | None = None) -> Path:
    """The file or folder behind ``bundled:quickstart/NAME`` or ``path:FILE``. ``recipe_folder`` is where the recipe is
    that names the source; a relative path does not start there. Raises DataError: the source has another form, or names
    a file that does not exist or has an unsupported type."""
    scheme, _, rest = source.partition(":")
    if scheme == "path" and rest:
        path = Path(rest).expanduser().absolute()
        if not path.exists():
            advice = next_to_recipe(rest, recipe_folder, form="path:{file}") or similar_name(path)
            remedy = advice or "give a data file, or a folder of them"
            raise DataError(f"no file {path}", where=where, remedy=remedy)
        files_of(path)
        return path
    if scheme == "bundled" and rest:
        return _bundled(rest, where=where)
    if scheme == "stage":
        raise DataError(
            f"{source!r} names the rows of a stage, so only a recipe with that stage can use it",
            where=where,
            remedy="name the file in the stage's result: path:artifacts/STAGE-FINGERPRINT/rows.jsonl",
        )
    forms = "write bundled:quickstart/NAME, path:FILE or hub:ORG/NAME@REVISION"
    raise DataError(f"{source!r} is not a valid data source", where=where, remedy=with_scheme(source) or forms)


def bundled_code() -> list[str]:
    """Python files that ship with the project's data, such as ``quickstart/house_style.py``."""
    folder = shipped("data")
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.py"))


def _bundled(name: str, *, where: str) -> Path:
    folder = shipped("data")
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.jsonl"))
    if name not in names:
        raise DataError(f"no bundled data '{name}'", where=where, remedy=suggestion(name, names))
    return folder / f"{name}.jsonl"


_MOST_NAMES = 1000
"""Names of a folder that are compared; more would take long."""


def next_to_recipe(written: str, recipe_folder: Path | None, *, form: str) -> str:
    """Advice if the relative path is right from the recipe's folder only; otherwise empty. ``form`` is how a source
    names a file, such as ``path:{file}``."""
    if recipe_folder is None or Path(written).expanduser().is_absolute():
        return ""
    meant = recipe_folder / written
    if not meant.exists():
        return ""
    source = form.format(file=meant)
    return f"relative paths start at the folder in which the command runs, not at the recipe's; write {source}"


def similar_name(path: Path) -> str:
    """``did you mean /data/birds.jsonl?`` if the folder has a file with a similar name; otherwise empty. Of a link that
    leads to no file, its target."""
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, which leads to no file; correct the link, or name another file"
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return ""
    close = nearest(path.name, sorted(names))
    return f"did you mean {path.with_name(close)}?" if close else ""


_FOLDER = "datasets--"


def source_rows(path: Path, data: SourceConfig) -> Iterator[RawRow | DataError]:
    """The rows of the files at ``path``; for a snapshot, the rows of the split that ``data`` names. Raises DataError:
    see ``hub_rows`` and ``rows_of``."""
    return map(parsed, unparsed_source_rows(path, data))


def unparsed_source_rows(path: Path, data: SourceConfig) -> Iterator[Unparsed]:
    """Like ``source_rows``, but lines of JSON in the user's files stay unparsed (``unparsed_rows_of``)."""
    return unparsed_rows_of(path) if snapshot_name(path) is None else hub_rows(path, data.split, data.subset)


def snapshot_name(path: Path) -> str | None:
    """``hub:ORG/NAME@COMMIT``, from the folders' names, if the path is a snapshot in a hub's cache; else None."""
    commit, snapshots, repository = path.name, path.parent.name, path.parent.parent.name
    if snapshots != "snapshots" or not repository.startswith(_FOLDER):
        return None
    return f"hub:{repository.removeprefix(_FOLDER).replace('--', '/')}@{commit}"


def content_of(path: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """How a fingerprint identifies the data at ``path``. It is a snapshot's name, since a commit never changes, else
    the SHA-256 of the content (``content_sha256``)."""
    return snapshot_name(path) or content_sha256(path, of_file)


def hub_rows(folder: Path, split: str, subset: str | None) -> Iterator[RawRow]:
    """The rows of a snapshot in order, each at ``hub:ORG/NAME@COMMIT SPLIT: row NUMBER``; numbers begin at 1. Raises
    DataError: the split or subset does not exist (the error lists those that do), or the files cannot be read."""
    name = snapshot_name(folder) or str(folder)
    location = " ".join(filter(None, (name, subset, split)))
    number = 0
    try:
        for number, row in enumerate(_rows_of_split(folder, split, subset, where=name), start=1):
            yield RawRow(where=f"{location}: row {number}", value=without_filled(row))
    except DataError:
        raise
    except Exception as error:  # readers of ``datasets`` raise whatever they like
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f"{location}, after row {number}" if number else location
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
    """A repository's description may name files anywhere; the commit would not identify their content. Raises
    DataError: a file is outside the snapshot."""
    for file in files:
        if not any(Path(normpath(file)).is_relative_to(root) for root in (folder, folder.resolve())):
            raise DataError(f"names a file outside the repository: {file}", where=where, remedy=_REMEDY)


_REMEDY = (
    "only JSON, CSV and Parquet files are read, never scripts; if it has such files in a folder, download them and "
    "give path:FOLDER"
)
