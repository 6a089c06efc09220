"""The settings of a data source as a user types them, and the command that examines the same rows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from alignment.config.data import SourceConfig

READ = ("split", "subset", "format", "columns", "placeholders")
"""Settings that say how rows are read."""
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)$)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE)
"""Texts that need no quotes in an override."""


def written(data: SourceConfig, prefix: str = "") -> list[str]:
    """``KEY=VALUE`` for each setting of how rows are read that is not at its default."""
    usual = SourceConfig()
    chosen = {name: getattr(data, name) for name in READ if getattr(data, name) != getattr(usual, name)}
    return [f"{prefix}{name}={_as_typed(value)}" for name, value in chosen.items()]


def doctor_command(source: str, data: SourceConfig) -> str:
    """The command that examines the rows of ``source``, read as ``data`` says."""
    return shlex.join(["align", "doctor", source, *written(data)])


def _as_typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_as_typed(item)}' for key, item in value.items())}}}"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
