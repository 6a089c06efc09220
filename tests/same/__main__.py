"""``make same``: does the working tree compute the same bits as another commit, and plan the same results?

Both run the same recipe (``recipe.yaml``) on this machine, because bits depend on the processor and the libraries. By
default the other commit is the last one: HEAD if files have changed since, else HEAD~1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.conftest import environment
from tests.field.models import save_model

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).with_name("recipe.yaml")
STAGES: dict[str, Any] = yaml.safe_load(RECIPE.read_text())["stages"]
CALLS = [file.stem + profile for file in sorted(ROOT.glob("recipes/*.yaml")) for profile in ("", " profile=smoke")]
DTYPES = ("float32", "bfloat16")
PLANS = "plans of recipes"
SAME = "same"

Results = dict[str, Any]
Table = dict[str, dict[str, str]]


def main() -> int:
    """Compares, prints a table, and returns 0 if all is the same."""
    parser = argparse.ArgumentParser(prog="python -m tests.same", description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="the other commit")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages of recipe.yaml, and no plans")
    options = parser.parse_args()
    commit = options.against or ("HEAD" if _git("status", "--porcelain") else "HEAD~1")
    print(f"the working tree against {commit} ({_git('log', '-1', '--format=%h %s', commit)})", flush=True)
    with checked_out(commit) as other:
        table = compare(other, ROOT, only=options.only or STAGES, calls=[] if options.only else CALLS)
    print(described(table))
    return int(any(not cell.startswith(SAME) for row in table.values() for cell in row.values()))


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary working tree of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def compare(
    before: Path, after: Path, *, only: Sequence[str], calls: Sequence[str], dtypes: Sequence[str] = DTYPES
) -> Table:
    """For each stage and dtype ``same``, or what differs between the package of tree ``before`` and that of ``after``;
    and for each of ``calls`` whether its plan has the same fingerprints. The stages that ``only`` start from run, too.
    """
    stages = _with_inputs(only)
    table: Table = {stage: {} for stage in stages}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as both:
        save_model(Path(folder, "model"), "llama", biased=True, template="smollm2")
        for dtype in dtypes:
            run = _runner(
                Path(folder, dtype), Path(folder, "model"), dtype, stages, calls if dtype == dtypes[0] else []
            )
            old, new = both.map(run, (before, after), ("before", "after"))  # each takes one core
            for stage in stages:
                table[stage][dtype] = difference(old["stages"].get(stage), new["stages"].get(stage))
            for stage in stages:
                inputs = [name for name in _with_inputs([stage])[:-1] if table[name][dtype] != SAME]
                if inputs and table[stage][dtype] != SAME:
                    table[stage][dtype] += f" (its input {', '.join(inputs)} differs, too)"
            if old["plans"]:
                table[PLANS] = {"": _plans(old["plans"], new["plans"])}
    return table


def _runner(
    folder: Path, model: Path, dtype: str, stages: Sequence[str], calls: Sequence[str]
) -> Callable[[Path, str], Results]:
    """A function that returns what the stages compute with the package of a tree."""
    overrides = [f"model.source='path:{model}'", f"model.dtype={dtype}"]
    overrides += [f"~stages.{stage}" for stage in STAGES if stage not in stages]
    if "benchmark" in stages:
        overrides.append(f"stages.benchmark.task_folders=['{ROOT / 'tests/data/tasks'}']")

    def run(tree: Path, name: str) -> Results:
        (folder / name).mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-P", RECIPE.with_name("golden.py"), RECIPE, json.dumps(overrides), json.dumps([*calls])],
            cwd=folder / name,
            env={**environment(), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            check=True,
        )
        results: Results = json.loads(done.stdout.splitlines()[-1])
        return results

    return run


def _with_inputs(stages: Sequence[str]) -> list[str]:
    """These stages and those that they read, in the recipe's order."""
    wanted = set(stages)
    for name, settings in reversed(STAGES.items()):
        if name in wanted:
            wanted |= {other for other in STAGES if f'"stage:{other}"' in json.dumps(settings)}
    return [name for name in STAGES if name in wanted]


def difference(before: Results | None, after: Results | None) -> str:
    """``same``, or the first metric that differs with both values and the files that do, or who refused the stage."""
    for when, result in (("before", before), ("now", after)):
        if result is None or "refused" in result:
            return f"refused {when}: {result['refused'] if result else 'it starts from a stage that was refused'}"
    if before == after or not (before and after):
        return SAME
    values = [_named(result["values"]) for result in (before, after)]
    differences = [f"{name} was {values[0].get(name)} and is {values[1].get(name)}" for name in _unequal(*values)[:1]]
    return f"differs: {'; '.join([*differences, *_unequal(before['files'], after['files'])])}"


def _named(values: Results) -> Results:
    return {f"{where}, {name}": value for where, step in values.items() for name, value in step.items()}


def _unequal(before: Results, after: Results) -> list[str]:
    return [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]


def _plans(before: Results, after: Results) -> str:
    changed = {call: ", ".join(_unequal(before[call], after[call])) for call in before}
    refused = [call for call in before if "refused" in before[call] and not changed[call]]
    listed = "; ".join(f"{call} ({stages})" for call, stages in changed.items() if stages)
    return (f"differs: {listed}" if listed else SAME) + (f" (both refuse {', '.join(refused)})" if refused else "")


def described(table: Table) -> str:
    """A row a stage and a word a dtype, then a line for all that is not the same."""
    rows = [[stage, *(cell.split()[0].strip(":") for cell in row.values())] for stage, row in table.items()]
    lines = ["".join(f"{word:18}" for word in row).rstrip() for row in [["", *DTYPES], *rows]]
    cells = {f"{stage} {dtype}".strip(): cell for stage, row in table.items() for dtype, cell in row.items()}
    return "\n".join([*lines, *(f"{where}: {cell}" for where, cell in cells.items() if cell != SAME)])


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *words], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
