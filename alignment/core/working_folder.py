"""The current folder, which may be gone."""

from __future__ import annotations

from pathlib import Path

from alignment.core.errors import ConfigError


def current_folder() -> Path:
    """The current folder.

    Raises:
        ConfigError: it was removed.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder no longer exists", remedy="change to a folder that exists") from None
