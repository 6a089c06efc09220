"""Finds the environment of an engine, which is never this package's own: their versions of torch differ."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from alignment.core.errors import ConfigError
from alignment.core.resources import command_for

VARIABLE = "ALIGNMENT_ENGINE_PYTHON"
ENGINES = {"vllm": "engine", "llama-cpp": "engine-llama"}
"""The engines that have an environment, each with the target of make that builds it."""
_QUERY = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def engines_folder() -> Path:
    """Where ``make engine`` builds environments."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment" / "engines"


def build_command(engine: str) -> str:
    """The command that builds the environment of an engine of ``ENGINES``."""
    return command_for(ENGINES[engine], "alignment.engines.build_environment", engine)


def interpreter(python: str | None, *, package: str, where: str) -> Path:
    """The interpreter of the environment that has ``package``; ``where`` is the setting for it.

    Raises:
        ConfigError: there is none, or it lacks the package.
    """
    given = python or os.environ.get(VARIABLE)
    path = Path(given).expanduser() if given else engines_folder() / package / "bin" / "python"
    build = f"build the environment with `{build_command(package)}`, or name its interpreter here or in {VARIABLE}"
    if not os.access(path, os.X_OK) or not path.is_file():
        raise ConfigError(f"{path} is not an interpreter that can be run", where=where, remedy=build)
    if not _has(path, package):
        raise ConfigError(f"{path} has no package {package}", where=where, remedy=build)
    return path


@cache
def _has(python: Path, package: str) -> bool:
    argv: Sequence[str] = [str(python), "-I", "-c", _QUERY, package]  # -I: a folder of that name here does not count
    try:
        return subprocess.run(argv, check=False, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):  # no program, or none that answers
        return False
