"""What a command, a recipe, a row and a script of the documentation have to stand, in the reader's folder. A check
raises what is wrong: the command's own error, or an AssertionError."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignment import cli
from alignment.core.errors import ConfigError
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.sweeps.sweep_file import read_sweep
from alignment.records.votes import read_votes
from tests.documented.blocks import ROOT, Block
from tests.documented.commands import Command, commands, same_output
from tests.documented.setting_paths import recipe_text
from tests.documented.workplace import tiny_model

STARTS_NOTHING = ("plan", "doctor", "preview", "recipes", "stages", "status")
"""Verbs that a test may call: they train and serve nothing."""
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
_TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
_VARIABLES = set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.MULTILINE))
_ABSENT = re.compile(r"(is not installed|are not installed)")
Captured = pytest.CaptureFixture[str]


def check_commands(block: Block, captured: Captured) -> None:
    """Every command of a block of the language bash or console."""
    for command in commands(block):
        check_command(block, command, captured)


def check_command(block: Block, command: Command, captured: Captured) -> None:
    """One of them; what it prints is compared with what the block says it prints."""
    if command.program == "make":
        for words in made_commands(command.words):
            check_align(block, words)
    elif command.program == "align":
        captured.readouterr()
        check_align(block, command.words[1:])
    elif command.program.startswith("python") and "-m" in command.words:
        check_module(block, command.words)
    else:
        assert block.needs, f"{block.id}: {command.program} is not ours; say what the block needs"
    if command.output:
        printed = captured.readouterr().out
        assert same_output(command.output, printed, differs="output differs" in block.comments), printed


def check_align(block: Block, words: list[str]) -> None:
    """A call of ``align``: parsed; planned if it trains; carried out if it starts nothing and needs nothing."""
    arguments = cli.parse(words)
    if "network" in block.needs and arguments.verb in ("run", "plan"):  # a plan would ask the store
        arguments.overrides = [text for text in arguments.overrides if not text.startswith("artifacts=s3:")]
    with _absent_packages_skip():
        if arguments.verb == "run":
            _planned(arguments, only=arguments.stage)
        elif arguments.verb == "sweep":
            read_sweep(arguments.recipe, arguments.sweep, arguments.overrides)
        elif arguments.verb == "plan" and (block.needs or _asks_for_costs(arguments)):
            _planned(arguments, only=None)  # tests/e2e/test_chain.py has what it would cost
        elif arguments.verb in STARTS_NOTHING and not block.needs:
            model = [f"model.source=path:{tiny_model()}"] if arguments.verb == "preview" else []
            assert cli.main([*words, *model]) == 0, f"{block.id}: align {' '.join(words)}"
        else:
            assert block.needs, f"{block.id}: a test cannot call align {arguments.verb}; say what the block needs"


def _asks_for_costs(arguments: argparse.Namespace) -> bool:
    return bool(arguments.cost or arguments.trade) or arguments.device != "this"


def _planned(arguments: argparse.Namespace, *, only: str | None) -> None:
    plan = make_plan(arguments.recipe, arguments.overrides)
    refuse_sizes(plan)
    assert only is None or only in {stage.name for stage in plan.stages}


@contextmanager
def _absent_packages_skip() -> Iterator[None]:
    """A package that is not installed here skips the test, with its name."""
    try:
        yield
    except ConfigError as error:
        if _ABSENT.search(str(error)):
            pytest.skip(str(error))
        raise


def made_commands(words: list[str]) -> list[list[str]]:
    """The calls of ``align`` that ``make`` with these words comes to, without its first word."""
    check_make(words)
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "ARGS"))
    }  # of a `make test ARGS=…`
    dry = ["make", "--dry-run", *words[1:]]
    done = subprocess.run(dry, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    called = re.findall(r"^\S*/align (.*)$", done.stdout, re.MULTILINE)
    return [shlex.split(line) for line in called]


def check_make(words: list[str]) -> None:
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        assert name in (_VARIABLES if equals else _TARGETS), f"the Makefile has no {name}"


def check_module(block: Block, words: list[str]) -> None:
    """``python -m MODULE``: the module exists, or is another program's."""
    module = words[words.index("-m") + 1]
    ours = module.split(".")[0] in ("alignment", "benchmarks", "tests")
    assert block.needs or ours, f"{block.id}: {module} is not ours; say what the block needs"
    assert not ours or importlib.util.find_spec(module) is not None, module


def check_recipe(block: Block, _: Captured) -> None:
    """A YAML block: a sweep, a task of a benchmark, or settings that are planned in the reader's folder."""
    if block.comments.get("file", "").startswith("tasks/"):
        return  # the benchmark's recipe on the same page reads it
    if "parameters:" in block.text:
        read_sweep("quickstart", f"./{block.comments['file']}", [])
        return
    Path("documented.yaml").write_text(recipe_text(block), encoding="utf-8")
    with _absent_packages_skip():
        plan = make_plan("./documented.yaml", shlex.split(block.comments.get("with", "")))
    refuse_sizes(plan)


def check_rows(block: Block, captured: Captured) -> None:
    """A JSON block: a row that ``align doctor`` finds no fault in."""
    row = json.loads(block.text)
    Path("row.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert cli.main(["doctor", "row.jsonl"]) == 0, captured.readouterr().out
    if "preferred" in row:
        assert read_votes(Path("row.jsonl"))  # which checks the hash of a vote


def check_script(block: Block, _: Captured) -> None:
    """A Python block runs to its end, or is compiled if it needs something. A model that it loads is a tiny one."""
    if block.needs:
        compile(block.text, block.id, "exec")
        return
    if "from_pretrained" in block.text:
        tiny_model()
    Path("script.py").write_text(block.text, encoding="utf-8")
    runpy.run_path("script.py")


def check_none(block: Block, _: Captured) -> None:
    assert "drawing" in block.comments, f"{block.id}: say what it is: a language, 'drawing' or 'checked by: FILE'"


def check(block: Block, captured: Captured) -> None:
    """A block as its language says, unless a test of its own checks it; that test must name the page."""
    if test := block.comments.get("checked by"):
        assert Path(block.page).name in (ROOT / test).read_text(encoding="utf-8"), f"{test} does not name the page"
        return
    assert block.language in CHECKS, f"nothing is known of the language {block.language!r}"
    CHECKS[block.language](block, captured)


CHECKS: Mapping[str, Callable[[Block, Captured], None]] = {
    "bash": check_commands,
    "console": check_commands,
    "yaml": check_recipe,
    "json": check_rows,
    "python": check_script,
    "": check_none,
}
"""What is done with a block of each language; another language is refused."""
