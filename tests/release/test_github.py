"""Workflow, hooks and forms do what `.ci/run` and `make check` do, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def content(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


BEFORE = ("model", "trackers")
"""What only brings what others need."""


def test_the_workflow_has_the_steps_of_ci() -> None:
    steps = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    job = content(ROOT / ".github/workflows/ci.yml")["jobs"]["make"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    targets = [match[1] for line in steps if (match := re.match(r"make ([a-z-]+)", line)) and match[1] not in BEFORE]
    assert commands[-1] == "make ${{ matrix.target }}"
    assert [target for target in job["strategy"]["matrix"]["target"] if target in targets] == targets
    assert commands[0].startswith("make model || ")
    assert any(step.get("with", {}).get("python-version") == "3.11" for step in job["steps"])


def test_the_hooks_are_those_of_make_check() -> None:
    hooks = content(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    called = [re.sub(r" --(force-exclude|fix)", "", hook["entry"].removeprefix(".venv/bin/")) for hook in hooks]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    checks = [
        line.removeprefix("\t$(BIN)/").removesuffix(" .").replace(" --check", "") for line in recipe[1].splitlines()
    ]
    assert called == checks
