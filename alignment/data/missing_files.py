"""What a user probably meant by a file that does not exist."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from alignment.config.did_you_mean import nearest

_MOST_NAMES = 1000
"""Names of a folder that are compared; more would take long."""


def next_to_recipe(written: str, recipe_folder: Path | None, *, form: str) -> str:
    """Advice if the relative path is right from the recipe's folder only; otherwise empty.

    ``form`` is how a source names a file, such as ``path:{file}``.
    """
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
