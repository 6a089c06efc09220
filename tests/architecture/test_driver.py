"""The driver answers without the training libraries; the worker runs without Hydra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.config.store import recipe_names, recipes_folder

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "huggingface_hub")

CODE = """
import json, sys
from alignment.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


def modules_after(*arguments: str) -> set[str]:
    """Runs the command in a process of its own and returns all that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    outcome = json.loads(done.stderr.splitlines()[-1])
    assert outcome["code"] == 0, done.stderr
    return {name.partition(".")[0] for name in outcome["modules"]}


ELSEWHERE = re.compile(r"hub:|path:")
OFFLINE = [name for name in recipe_names() if not ELSEWHERE.search((recipes_folder() / f"{name}.yaml").read_text())]
"""What a hub's data set is, its own library says; a path is a file of the user's."""


@pytest.mark.parametrize("arguments", [*(("plan", name) for name in OFFLINE), ("--help",), ("status",)])
def test_the_driver_imports_no_training_library(arguments: tuple[str, ...], tmp_path: Path) -> None:
    more = {"plan": [f"output={tmp_path}"], "status": ["--output", str(tmp_path)]}.get(arguments[0], [])
    assert not modules_after(*arguments, *more) & set(HEAVY)


def test_a_plan_of_benchmarks_does_not_import_the_harness(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "defaults: [base, stage@stages.benchmark: benchmark, _self_]\n"
        f"stages: {{benchmark: {{tasks: [both, shout], task_folders: ['{ROOT / 'tests/data/tasks'}']}}}}\n"
    )
    assert not modules_after("plan", str(recipe), f"output={tmp_path}") & {*HEAVY, "lm_eval"}


@pytest.mark.parametrize("arguments", [("--help",), ("stages",), ("recipes",), ("run", "--help"), ("sweep", "--help")])
def test_help_and_listings_do_not_even_import_hydra(arguments: tuple[str, ...]) -> None:
    assert "hydra" not in modules_after(*arguments)


def test_import_directions_hold() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
