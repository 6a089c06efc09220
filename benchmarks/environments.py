"""Environments of rivals that cannot share ours, built once from ``environments/NAME.txt``."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import ROOT, scrubbed

REQUIREMENTS = Path(__file__).parent / "environments"
FOLDER = Path(__file__).parent / ".environments"


class CannotBuild(Exception):
    """pip or venv said no; the message is what it said."""


def python_of(name: str) -> Path:
    """The interpreter of an environment, built first where it is missing or its requirements have changed.

    Raises:
        CannotBuild: with the last line that says why.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    folder = FOLDER / name
    python = folder / "bin" / "python"
    marker = folder / "requirements.sha256"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if marker.exists() and marker.read_text() == wanted:
        return python
    print(f"building the environment {name}, once", flush=True)
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(folder)])
    quiet = ["--quiet", "--disable-pip-version-check"]
    _call([str(python), "-m", "pip", "install", *quiet, "--requirement", str(requirements)])
    marker.write_text(wanted)
    return python


def versions_in(python: str) -> dict[str, str]:
    """Versions of the packages that matter, in the environment of an interpreter."""
    code = "import json; from benchmarks.machine import versions; print(json.dumps(versions()))"
    printed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    versions: dict[str, str] = json.loads(printed)
    return versions


def _call(command: list[str]) -> None:
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode != 0:
        lines = [line.strip() for line in (outcome.stdout + outcome.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason was given"]
        raise CannotBuild(scrubbed(errors[-1]))
