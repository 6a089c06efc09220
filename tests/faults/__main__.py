"""``python -m tests.faults``: puts each fault of the table into a copy of the tree and runs tests that should see it.

A fault that these tests do not notice is tried with the folder around them. Exit code: 0 all were caught, 1 a fault
survived or does not fit the source, or a test fails without any fault, 2 a wrong option.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.faults.fault import Fault, Stale, table
from tests.faults.trial import ROOT, copy_of_tree, import_libraries, log_of, outcome, start

FAILED = 1
"""pytest's exit code where tests ran and some failed."""
PATIENCE = 600.0
CAUGHT = "caught"


@dataclass(kw_only=True)
class Trial:
    """A fault under way in a copy of the tree; ``tests`` are those that run, relative to it."""

    fault: Fault
    tree: Path
    tests: str
    changed: Path
    before: str
    process: BaseProcess
    deadline: float

    @property
    def is_over(self) -> bool:
        """Whether the tests have ended, or take too long."""
        return not self.process.is_alive() or time.monotonic() >= self.deadline

    def verdict(self) -> str:
        """``caught``, or what went wrong."""
        if self.process.is_alive():
            return f"SURVIVED: no answer in {PATIENCE:.0f} s"
        code, states = outcome(self.tree)
        if code == FAILED and "failed" in states.values():
            return CAUGHT
        reason = "" if code == 0 else f": the tests could not be run (pytest ended with {code})"
        log = log_of(self.tree).read_text(encoding="utf-8")[-2000:] if code else ""
        return f"SURVIVED {self.tests}{reason}\n{log}".strip()

    def end(self) -> None:
        """Stops what still runs, and takes the fault out of the tree."""
        if self.process.is_alive():
            assert self.process.pid is not None
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.changed.write_text(self.before, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table, or what was asked for of it; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names, or of the files, of those to run")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--record", type=Path, help="a JSON file for the outcome")
    options = parser.parse_args(argv)
    chosen = [fault for fault in table() if options.only in fault.name or options.only in fault.file]
    if not chosen or options.jobs < 1:
        parser.error(f"nothing to do with --only {options.only!r} --jobs {options.jobs}")
    started = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    import_libraries()
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / f"tree-{number}" for number in range(options.jobs)]
        for tree in trees:
            copy_of_tree(tree)
        red = red_without_a_fault(chosen, trees)
        verdicts = {} if red else run_all(chosen, trees)
    for line in red:
        print(f"RED WITHOUT A FAULT {line}")
    survived = [name for name, verdict in verdicts.items() if verdict != CAUGHT]
    caught = len(verdicts) - len(survived)
    print(f"{caught} of {len(chosen)} caught in {time.monotonic() - started:.0f} s")
    if options.record is not None:
        record = {"faults": len(chosen), "caught": caught, "survived": survived}
        options.record.write_text(json.dumps(record), encoding="utf-8")
    return int(caught < len(chosen))


def red_without_a_fault(chosen: Sequence[Fault], trees: Sequence[Path]) -> list[str]:
    """Tests of the table that do not pass in the tree as it is, or do not run."""
    files = sorted({tests_of(fault, ROOT) for fault in chosen})
    shares = {tree: files[index :: len(trees)] for index, tree in enumerate(trees) if files[index:]}
    for process in [start(tree, share, stop_at_failure=False) for tree, share in shares.items()]:
        process.join()
    red = []
    for tree in shares:
        code, states = outcome(tree)
        failed = [f"{test}: {state}" for test, state in states.items() if state == "failed"]
        if code != 0 or failed:
            print(log_of(tree).read_text(encoding="utf-8")[-4000:])
            red += failed or [f"pytest ended with {code}"]
    return red


def tests_of(fault: Fault, root: Path) -> str:
    """The tests that are likely to notice it: those of the table, or the nearest folder that still exists."""
    return next(str(path) for path in (Path(fault.tests), *Path(fault.tests).parents) if (root / path).exists())


def run_all(chosen: Sequence[Fault], trees: Sequence[Path]) -> dict[str, str]:
    """The verdict on each fault, by name."""
    todo = [(fault, tests_of(fault, ROOT)) for fault in chosen]
    free = list(trees)
    running: list[Trial] = []
    verdicts: dict[str, str] = {}
    while todo or running:
        while todo and free:
            fault, tests = todo.pop(0)
            try:
                running.append(_begun(fault, tests, free[-1]))
                free.pop()
            except Stale as stale:
                verdicts[fault.name] = f"STALE {stale}"
                print(verdicts[fault.name], flush=True)
        wait([trial.process.sentinel for trial in running], timeout=1.0)
        for trial in [trial for trial in running if trial.is_over]:
            running.remove(trial)
            verdict = trial.verdict()
            trial.end()
            free.append(trial.tree)
            if verdict != CAUGHT and trial.tests.endswith(".py"):
                todo.append((trial.fault, str(Path(trial.tests).parent)))
                continue
            verdicts[trial.fault.name] = verdict
            print(f"{len(verdicts)}/{len(chosen)} {trial.fault.name}: {verdict}", flush=True)
    return verdicts


def _begun(fault: Fault, tests: str, tree: Path) -> Trial:
    changed, before = fault.apply(tree)
    return Trial(
        fault=fault,
        tree=tree,
        tests=tests,
        changed=changed,
        before=before,
        process=start(tree, [tests], stop_at_failure=True),
        deadline=time.monotonic() + PATIENCE,
    )


if __name__ == "__main__":
    sys.exit(main())
