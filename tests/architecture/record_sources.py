"""Holds the sources of each stage's arithmetic against what was recorded when its ``revision`` was last decided on.

    python -m tests.architecture.record_sources                  after raising the revision of every stage named
    python -m tests.architecture.record_sources --same-numbers   where the numbers of those that were not raised stay

Comments, docstrings, formatting and the words of errors do not count.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment.stages.registry import kinds

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("sources.json")
KINDS = [name for name, kind in kinds().items() if kind.run]
"""A stage inside the driver shows numbers and makes none."""
NO_ARITHMETIC = (
    "alignment.core.artifacts",
    "alignment.pipeline.sources.bundled_model",
    "alignment.config",
    "alignment.data.hub_rows",
    "alignment.core.errors",
    "alignment.core.locks",
    "alignment.core.resources",
    "alignment.job",
    "alignment.records",
    "alignment.training.checkpoints",
    "alignment.training.finite",
    "alignment.training.heartbeat",
    "alignment.training.trackers",
    "alignment.training.trackers.all_trackers",
    "alignment.core.typed_json",
    "alignment.core.versions",
    "alignment.commands.chat.chat_session",
)
"""Modules that write, check or announce, and settings, whose values are in a fingerprint themselves."""

Record = dict[str, dict[str, Any]]


def sources_of(kind: str) -> dict[str, str]:
    """A stage's modules with a hash of what each says, by path: all that its own module imports, in the end."""
    todo, seen = [f"alignment.stages.{kind}.run"], set()
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += _read(module)[1]
    return {_file(module).relative_to(ROOT).as_posix(): _read(module)[0] for module in sorted(seen)}


def today() -> Record:
    """What would be recorded now."""
    files = {path: sha for kind in KINDS for path, sha in sources_of(kind).items()}
    return {"revisions": {kind: kinds()[kind].revision for kind in KINDS}, "files": dict(sorted(files.items()))}


def recorded() -> Record:
    """What was."""
    record: Record = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def undecided(record: Record) -> dict[str, list[str]]:
    """Stages of which files changed since they were recorded and the revision did not, with these files."""
    changed = {kind: _changed(kind, record) for kind in KINDS}
    same = {kind for kind in KINDS if record["revisions"].get(kind) == kinds()[kind].revision}
    return {kind: files for kind, files in changed.items() if files and kind in same}


def normal_hash(tree: ast.Module) -> str:
    """Of what a module says, without its docstrings and the words of its errors."""
    return hashlib.sha256(json.dumps(_plain(tree)).encode()).hexdigest()[:16]


def _changed(kind: str, record: Record) -> list[str]:
    return [path for path, sha in sources_of(kind).items() if record["files"].get(path) != sha]


def _plain(node: Any) -> Any:
    """Nested lists that stand for a syntax tree; fields that are empty are left out, as Python's versions differ in
    them."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, ast.Raise):
        return ["Raise", _plain(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)]
    if isinstance(node, ast.AST):
        fields = ((name, _body(node) if name == "body" else value) for name, value in ast.iter_fields(node))
        return [type(node).__name__, *([name, _plain(value)] for name, value in fields if value not in (None, []))]
    return repr(node)


def _body(node: ast.AST) -> Any:
    """Without texts that stand alone: docstrings of modules, classes, functions and constants."""
    body = getattr(node, "body", None)
    if not isinstance(body, list):
        return body
    return [line for line in body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith("alignment.") and _file(name).is_file() and not _excluded(name):
                yield name


def _excluded(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NO_ARITHMETIC)


def _file(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _read(module: str) -> tuple[str, list[str]]:
    """A module's hash and what it imports."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    return normal_hash(tree), list(_imports(tree))


def main() -> int:
    """Records, or says which stages want a decision first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--same-numbers", action="store_true", help="the numbers of these stages are the same")
    options = parser.parse_args()
    open_stages = undecided(recorded()) if RECORD.exists() else {}
    if open_stages and not options.same_numbers:
        for kind, files in open_stages.items():
            print(f"{kind} (revision {kinds()[kind].revision}): {', '.join(files)}")
        print("Raise the revision of those whose numbers change; then, or if none do, --same-numbers.")
        return 1
    RECORD.write_text(json.dumps(today(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
