"""Files of results whose entries may come from different runs: the file lists the runs, each entry names its run."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from alignment.core.artifacts import write_json
from alignment.core.hardware import PACKAGES
from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from benchmarks.machine import processor

ROOT = Path(__file__).parents[1]
_SOURCES = (
    "alignment",
    "benchmarks",
    "conf",
    "data",
    "launch",
    "recipes",
    "tests",
    "constraints.txt",
    "pyproject.toml",
)


def current_run() -> dict[str, Any]:
    """Date, commit, device and versions of this run."""
    machine = processor()
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    packages = [name for name in (*PACKAGES, "deepspeed") if name in installed and name != "alignment-pipeline"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of_checkout(ROOT),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {machine['model']}",
        "cores": machine["cores"],
        "versions": {
            "python": sys.version.split()[0],
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def uncommitted(root: Path = ROOT) -> list[str]:
    """Sources that differ from the commit, so that a result could not be traced to it."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--", *_SOURCES]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def merge(
    previous: dict[str, Any], run: dict[str, Any], key: str, entries: Sequence[dict[str, Any]], names: Iterable[str]
) -> dict[str, Any]:
    """The content of a file in which ``entries`` replace those that have the same values of ``names``. Runs that no
    entry comes from any more are dropped."""
    runs = list(previous.get("runs", []))
    number = runs.index(run) if run in runs else len(runs)
    runs[number:] = runs[number:] or [run]
    by_name = {tuple(entry[name] for name in names): entry for entry in previous.get(key, [])}
    by_name |= {tuple(entry[name] for name in names): {**entry, "run": number} for entry in entries}
    used = sorted({entry["run"] for entry in by_name.values()})
    return {
        "runs": [runs[number] for number in used],
        key: [{**entry, "run": used.index(entry["run"])} for entry in by_name.values()],
    }


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def update(file: Path, key: str, entries: Sequence[dict[str, Any]], names: Iterable[str]) -> dict[str, Any] | None:
    """Writes the entries into the file and returns its content; None, and a word why, if sources are not committed."""
    if changed := uncommitted():
        print(
            f"{file.relative_to(ROOT)} is left as it is: {len(changed)} files are not committed ({changed[0].strip()})"
        )
        return None
    content = merge(read(file), current_run(), key, entries, names)
    write_json(file, content)
    return content
