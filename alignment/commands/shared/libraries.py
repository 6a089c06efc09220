"""Libraries that only some commands need."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from alignment.core.errors import ConfigError

PAGE_LIBRARIES = {"starlette": "starlette>=1,<2", "uvicorn": "uvicorn>=0.34,<1"}
"""What a page on this machine needs."""


def refuse_without(libraries: Mapping[str, str], *, where: str, needs: str) -> None:
    """Checks that libraries are installed: the name of each package, and what pip is to install.

    ``needs`` begins the message, as in "the page needs".

    Raises:
        ConfigError: one is missing.
    """
    missing = [wanted for name, wanted in libraries.items() if importlib.util.find_spec(name) is None]
    if missing:
        command = f"pip install {' '.join(repr(wanted) for wanted in missing)}"
        names = " and ".join(wanted.partition(">")[0] for wanted in missing)
        raise ConfigError(f"{needs} {names}, not installed here", where=where, remedy=command)
