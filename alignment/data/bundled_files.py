"""Where rows come from: a file that ships with the project, or the user's files."""

from __future__ import annotations

from pathlib import Path

from alignment.config.did_you_mean import suggestion, with_scheme
from alignment.core.errors import DataError
from alignment.core.resources import shipped
from alignment.data.missing_files import next_to_recipe, similar_name
from alignment.data.row_files import files_of


def locate(source: str, *, where: str = "", recipe_folder: Path | None = None) -> Path:
    """The file or folder behind ``bundled:quickstart/NAME`` or ``path:FILE``.

    ``recipe_folder`` is where the recipe is that names the source; a relative path does not start there.

    Raises:
        DataError: the source has another form, or names a file that does not exist or has an unsupported type.
    """
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
