"""Runs a recipe with the ``alignment`` of one tree, and prints as JSON what every stage computed.

    PYTHONPATH=TREE python -P golden.py RECIPE '["OVERRIDE", …]' '["RECIPE OVERRIDE…", …]'

The last argument lists the plans whose fingerprints are wanted. It imports nothing else of the repository, so that the
same file runs with the package of any commit. The working folder becomes the output.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import alignment

NOISE = re.compile(r"seconds|_bytes|per_second|^(time|memory)(/|$)")
"""Names of times and memory."""


def golden(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """What each stage computed, or the error with which it was refused; then the others run without it."""
    refused: dict[str, Any] = {}
    while True:
        try:
            run = alignment.run(recipe, [*overrides, *(f"~stages.{name}" for name in refused)], quiet=True)
        except alignment.AlignmentError as error:
            names = {*re.findall(r"stages\.(\w+)", str(error))} or _failed(recipe)
            if not names - set(refused):
                raise
            refused |= {name: {"refused": _placeless(str(error))} for name in names}
        else:
            return refused | {name: computed(stage) for name, stage in run.stages.items()}


def _failed(recipe: str) -> set[str]:
    run = alignment.load_run(Path("runs", Path(recipe).stem))
    return {name for name, stage in run.stages.items() if stage.state == "failed"}


def computed(stage: Any) -> dict[str, Any]:
    """A result without times and memory: its logged steps and metrics, and hashes of its weights and rows."""
    files = sorted(file for file in stage.artifact.rglob("*") if file.suffix in (".safetensors", ".jsonl"))
    steps = {f"step {number}": step for number, step in enumerate(stage.steps(), 1)}
    hashes = {str(file.relative_to(stage.artifact)): hashlib.sha256(_content(file)).hexdigest() for file in files}
    return {"values": _quiet(steps | {"result": stage.metrics}), "files": hashes}


def _content(file: Path) -> bytes:
    if file.suffix == ".safetensors":
        return file.read_bytes()
    text = json.dumps([_quiet(json.loads(line)) for line in file.read_text().splitlines()])
    return _placeless(text).encode()


def _placeless(text: str) -> str:
    """Without the folders in which files lie that it names."""
    return text.replace(os.environ["PYTHONPATH"], "").replace(str(Path.cwd()), "")


def _quiet(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _quiet(item) for key, item in value.items() if not NOISE.search(key)}
    return [_quiet(item) for item in value] if isinstance(value, list) else value


def fingerprints(call: str) -> dict[str, str]:
    """The fingerprint of each stage of a plan, or the error with which it was refused."""
    recipe, *overrides = call.split()
    try:
        return {name: stage.fingerprint for name, stage in alignment.plan(recipe, overrides).stages.items()}
    except alignment.AlignmentError as error:
        return {"refused": _placeless(str(error))}


if __name__ == "__main__":
    assert Path(alignment.__file__).is_relative_to(os.environ["PYTHONPATH"]), alignment.__file__
    overrides, calls = json.loads(sys.argv[2]), json.loads(sys.argv[3])
    plans = {call: fingerprints(call) for call in calls}
    print(json.dumps({"stages": golden(sys.argv[1], overrides), "plans": plans}))
