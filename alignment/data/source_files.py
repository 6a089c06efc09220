"""Where rows come from: a file that ships with the project, or the user's files."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from alignment.config.faults import nearest, suggestion, with_scheme
from alignment.core.errors import DataError
from alignment.core.files import shipped
from alignment.data.row_files import files_of


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
