"""The public API is what it was when it was last recorded, costs nothing to import, and is known to type checkers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import alignment
from tests.architecture.public_names import RECORD, lines

PACKAGE = Path(alignment.__file__).parent
CODE = """
import json, sys
before = set(sys.modules)
import alignment
imported = set(sys.modules) - before
{use}
print(json.dumps([sorted(imported), sorted(sys.modules)]))
"""


def modules_after(use: str) -> tuple[set[str], set[str]]:
    """What importing the package imports, and all modules after its ``use``, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE.format(use=use)], capture_output=True, text=True, check=True)
    imported, after = json.loads(done.stdout)
    return set(imported), {name.partition(".")[0] for name in after}


def test_names_and_signatures_are_as_recorded() -> None:
    recorded = RECORD.read_text(encoding="utf-8").splitlines()
    assert lines() == recorded, "if callers may see this change: python -m tests.architecture.public_names"


def test_importing_the_package_imports_nothing_else() -> None:
    imported, after = modules_after("")
    assert [name for name in imported if name.startswith("alignment.")] == []
    assert not after & {"torch", "hydra", "omegaconf", "rich", "yaml", "numpy", "pandas", "psutil"}


def test_planning_and_loading_never_import_training_libraries_or_tables() -> None:
    _, after = modules_after("alignment.plan, alignment.run, alignment.load_run, alignment.load_sweep")
    assert "hydra" in after
    assert not after & {"torch", "transformers", "trl", "peft", "datasets", "pandas", "optuna"}


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    known = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(known) == sorted(alignment.__all__)
    for name, module in known.items():
        assert getattr(alignment, name).__module__ == module
    assert set(alignment.__all__) <= set(dir(alignment))
