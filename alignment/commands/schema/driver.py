"""``align schema``: prints a JSON Schema, made from the settings and choices that are installed now."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from alignment.commands.schema.recipe_schema import recipe_schema
from alignment.commands.schema.sweep_schema import sweep_schema
from alignment.core.errors import ConfigError


def show_schema(console: Console, file: str, *, beside: str | None = None) -> int:
    """Prints the schema of a ``recipe`` or a ``sweep``; returns the exit code.

    Raises:
        ConfigError: there is no folder ``beside``, or a sweep is asked for, which chooses no files.
    """
    folders = []
    if beside is not None:
        if file != "recipe":
            raise ConfigError("a sweep does not choose files", where="--beside", remedy="leave it out")
        if not Path(beside).expanduser().is_dir():
            raise ConfigError(f"no folder {beside}", where="--beside", remedy="name the folder of your recipes")
        folders = [Path(beside).expanduser()]
    schema = recipe_schema(folders) if file == "recipe" else sweep_schema()
    console.print(json.dumps(schema, indent=1, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True)
    return 0
