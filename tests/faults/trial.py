"""Runs tests in a copy of the tree, in a process forked from one that has imported the libraries but not our code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FORK = get_context("fork")


def copy_of_tree(target: Path) -> None:
    """The files of the checkout, changes and new files included, and none that git ignores."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def import_libraries() -> None:
    """What takes seconds is imported once; one thread, so that a fork is safe."""
    import datasets  # noqa: F401
    import hydra  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaForCausalLM, Trainer  # noqa: F401
    from trl import DPOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    ours = [name for name in sys.modules if name.partition(".")[0] == "alignment"]
    assert not ours, f"a fork would keep these modules as they are: {ours}"


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A failure in any phase makes a test failed; one that passed its call passed."""
        counts = report.outcome != "passed" or report.when == "call"
        if counts and self.states.get(report.nodeid) != "failed":
            self.states[report.nodeid] = report.outcome


def start(tree: Path, tests: Sequence[str], *, stop_at_failure: bool) -> BaseProcess:
    """A process that runs ``tests`` in ``tree`` and leaves ``outcome.json`` and ``log.txt`` beside it."""
    _outcome_file(tree).unlink(missing_ok=True)
    process = FORK.Process(target=_run, args=(tree, list(tests), stop_at_failure))
    process.start()
    return process


def outcome(tree: Path) -> tuple[int | None, dict[str, str]]:
    """pytest's exit code and the state of each test; no code where the process ended without a word."""
    try:
        record: dict[str, Any] = json.loads(_outcome_file(tree).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, {}
    return record["code"], record["states"]


def log_of(tree: Path) -> Path:
    """What pytest printed."""
    return tree.with_name(f"{tree.name}.log.txt")


def _outcome_file(tree: Path) -> Path:
    return tree.with_name(f"{tree.name}.outcome.json")


def _run(tree: Path, tests: list[str], stop_at_failure: bool) -> None:
    os.setsid()  # what a test starts ends with it
    with log_of(tree).open("wb") as sink:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(sink.fileno(), stream.fileno())
    os.chdir(tree)
    _forget_the_checkout(tree)
    outcomes = Outcomes()
    # A plugin that the libraries have imported as well is none whose assertions matter here.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    # In pytest's own folder, processes that end at the same time remove old folders, and one of them may fail at it.
    options += [f"--basetemp={tree.with_name(f'{tree.name}.temporary')}"]
    options += ["-x"] if stop_at_failure else []
    code = int(pytest.main([*options, *tests], plugins=[outcomes]))
    imported = sys.modules.get("alignment")
    if imported is not None and not str(imported.__file__).startswith(str(tree)):
        print(f"{imported.__file__} was imported, which is not in {tree}")
        code = -1
    _outcome_file(tree).write_text(json.dumps({"code": code, "states": outcomes.states}), encoding="utf-8")
    sys.stdout.flush()


def _forget_the_checkout(tree: Path) -> None:
    """From here on the package and its tests are those of the copy, in processes that tests start as well."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    sys.dont_write_bytecode = True  # a file's text changes faster than its time of change
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = str(tree)
