"""``python -m tests.mutations``: puts each fault of the table into a copy of the tree and runs the test that must fail.

Exit code: 0 all were caught, 1 one survived, or an entry is stale, or a test fails without any fault, 2 a wrong option.
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

from tests.mutations.mutation import Mutation
from tests.mutations.table import MUTATIONS
from tests.mutations.trial import ROOT, copy_of_tree, import_libraries, log_of, outcome, start

FAILED = 1
"""pytest's exit code where tests ran and some failed."""
PATIENCE = 300.0
CAUGHT = "caught"


@dataclass(kw_only=True)
class Trial:
    """A mutation under way in a copy of the tree."""

    mutation: Mutation
    tree: Path
    before: str
    process: BaseProcess
    deadline: float

    def verdict(self) -> str:
        """``caught``, or what went wrong."""
        if time.monotonic() >= self.deadline:
            return f"SURVIVED: no answer in {PATIENCE:.0f} s"
        code, states = outcome(self.tree)
        if code == FAILED and "failed" in states.values():
            return CAUGHT
        reason = "" if code == 0 else f": the test could not be run (pytest ended with {code})"
        log = log_of(self.tree).read_text(encoding="utf-8")
        return f"SURVIVED{reason} {self.mutation.test} {states}\n{log[-2000:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table, or what was asked for of it; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names, or of the files, of those to run")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once")
    parser.add_argument("--record", type=Path, help="a JSON file for the outcome")
    options = parser.parse_args(argv)
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name or options.only in mutation.file]
    if not chosen or options.jobs < 1:
        parser.error(f"nothing to do with --only {options.only!r} --jobs {options.jobs}")
    stale = [f"{mutation.name}: {fault}" for mutation in chosen if (fault := mutation.fault(ROOT))]
    for line in stale:
        print(f"STALE {line}")
    if stale:
        return 1
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
        record = {"mutations": len(chosen), "caught": caught, "survived": survived}
        options.record.write_text(json.dumps(record), encoding="utf-8")
    return int(caught < len(chosen))


def red_without_a_fault(chosen: Sequence[Mutation], trees: Sequence[Path]) -> list[str]:
    """Tests of the table that do not pass in the tree as it is, or do not run."""
    tests = sorted({mutation.test for mutation in chosen})
    shares = {tree: tests[index :: len(trees)] for index, tree in enumerate(trees) if tests[index:]}
    for process in [start(tree, share, stop_at_failure=False) for tree, share in shares.items()]:
        process.join()
    red = []
    for tree, share in shares.items():
        code, states = outcome(tree)
        failed = [f"{test}: {state}" for test, state in states.items() if state != "passed"]
        failed += [f"{test}: did not run" for test in share if not any(ran.startswith(test) for ran in states)]
        if code != 0 or failed:
            print(log_of(tree).read_text(encoding="utf-8")[-4000:])
            red += failed or [f"pytest ended with {code}"]
    return red


def run_all(chosen: Sequence[Mutation], trees: Sequence[Path]) -> dict[str, str]:
    """The verdict on each mutation, by name."""
    todo, free = list(chosen), list(trees)
    running: list[Trial] = []
    verdicts: dict[str, str] = {}
    while todo or running:
        while todo and free:
            running.append(_begun(todo.pop(0), free.pop()))
        wait([trial.process.sentinel for trial in running], timeout=1.0)
        for trial in [
            candidate
            for candidate in running
            if not candidate.process.is_alive() or time.monotonic() >= candidate.deadline
        ]:
            running.remove(trial)
            verdicts[trial.mutation.name] = verdict = _ended(trial)
            free.append(trial.tree)
            print(f"{len(verdicts)}/{len(chosen)} {trial.mutation.name}: {verdict}", flush=True)
    return verdicts


def _begun(mutation: Mutation, tree: Path) -> Trial:
    before = mutation.apply(tree)
    process = start(tree, [mutation.test], stop_at_failure=True)
    return Trial(mutation=mutation, tree=tree, before=before, process=process, deadline=time.monotonic() + PATIENCE)


def _ended(trial: Trial) -> str:
    verdict = trial.verdict()
    if trial.process.is_alive():
        assert trial.process.pid is not None
        os.killpg(trial.process.pid, signal.SIGKILL)
    trial.process.join()
    (trial.tree / trial.mutation.file).write_text(trial.before, encoding="utf-8")
    return verdict


if __name__ == "__main__":
    sys.exit(main())
