"""The chat templates in the installed TRL package, by the names of their files.

Those for training (``qwen3_training``) keep the thoughts of earlier turns, where the model's own template drops them.
TRL itself is not imported, which would take seconds.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from alignment.config.did_you_mean import nearest
from alignment.core.errors import DataError

TRL = "trl:"


def trl_file(name: str) -> Path:
    """The file of the template ``name``.

    Raises:
        DataError: TRL ships none of this name, or is not installed.
    """
    files = trl_templates()
    if name not in files:
        hint = nearest(name, files)
        did_you_mean = f"; did you mean {TRL}{hint}?" if hint else ""
        raise DataError(
            f"TRL ships no chat template {name!r}{did_you_mean}",
            where="model.chat_template",
            remedy=f"one of: {', '.join(sorted(files))}" if files else "install trl",
        )
    return files[name]


def trl_templates() -> dict[str, Path]:
    """The templates by name; empty if TRL is not installed."""
    package = find_spec("trl")
    folders = [] if package is None else package.submodule_search_locations or []
    return {file.stem: file for folder in folders for file in Path(folder, "chat_templates").glob("*.jinja")}


def trained_as(template: str) -> tuple[str, str] | None:
    """The source of TRL's training template for a model, if TRL ships one, and its text.

    The model's own ``template`` is known by its text. Lines in front of it, such as those of options, stay.
    """
    files = trl_templates()
    for name, file in sorted(files.items()):
        trained = f"{name}_training"
        own = file.read_text(encoding="utf-8")
        if trained in files and template.endswith(own):
            return f"{TRL}{trained}", template.removesuffix(own) + files[trained].read_text(encoding="utf-8")
    return None
