"""The driver answers without the training libraries; the worker runs without Hydra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from alignment.config.run import recipe_names, recipes_folder

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "huggingface_hub")

CODE = """
import json, sys
from alignment.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps({"code": code, "modules": modules}), file=sys.stderr)
"""


def modules_after(*commands: tuple[str, ...]) -> list[set[str]]:
    """Runs the commands one after another in a process of their own; returns all that was imported after each."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    outcomes = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"code"')]
    assert [outcome["code"] for outcome in outcomes] == [0] * len(commands), done.stderr
    return [set(outcome["modules"]) for outcome in outcomes]


ELSEWHERE = re.compile(r"hub:|path:")
OFFLINE = [name for name in recipe_names() if not ELSEWHERE.search((recipes_folder() / f"{name}.yaml").read_text())]
"""What a hub's data set is, its own library says; a path is a file of the user's."""


LISTINGS = [("--help",), ("stages",), ("recipes",), ("run", "--help"), ("sweep", "--help")]


def test_the_driver_imports_no_training_library_and_listings_not_even_hydra(tmp_path: Path) -> None:
    plans = [("plan", name, f"output={tmp_path}") for name in OFFLINE]
    commands = [*LISTINGS, ("status", "--output", str(tmp_path)), *plans]
    for number, (command, modules) in enumerate(zip(commands, modules_after(*commands), strict=True)):
        assert not modules & set(HEAVY), command
        assert number >= len(LISTINGS) or "hydra" not in modules, command
    assert plans


def test_a_plan_of_benchmarks_does_not_import_the_harness(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.benchmark: benchmark, _self_]\n"
        f"stages: {{benchmark: {{tasks: [both, shout], task_folders: ['{ROOT / 'tests/data/tasks'}']}}}}\n"
    )
    (modules,) = modules_after(("plan", str(recipe), f"output={tmp_path}"))
    assert not modules & {*HEAVY, "lm_eval"}


def test_import_directions_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
