"""``make gpu-check``: tries everything on one card in less than ten minutes, unattended, and writes a page about it.

Exit code: 0 all checks passed, 1 some failed and the page says which, 2 no CUDA device or a wrong option.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu_check.card import own_card
from benchmarks.gpu_check.checks import all_checks, run_all
from benchmarks.gpu_check.page import write
from benchmarks.machine import ROOT

PAGES = ROOT / "docs" / "gpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks; see the module for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--only", default="", help="comma-separated names of checks; all if not given")
    parser.add_argument("--pages", type=Path, default=PAGES, help="the folder that the page goes to")
    parser.add_argument("--stages", default="", help="part of the names of the stages to try, such as sft-lora")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        checks = all_checks(Path(folder), stages=options.stages)
        chosen = list(filter(None, options.only.split(",")))
        names = [check.name for check in checks]
        if unknown := sorted(set(chosen) - set(names)):
            parser.error(f"no check {', '.join(unknown)}; there are {', '.join(names)}")
        card = own_card()
        if card is None:
            print(
                "gpu-check: PyTorch finds no CUDA device. Install the build of PyTorch that fits the card's driver, or "
                "look at CUDA_VISIBLE_DEVICES, then try again.",
                file=sys.stderr,
            )
            return 2
        print(f"{card.name}, {card.count} of them", flush=True)
        outcomes = run_all([check for check in checks if not chosen or check.name in chosen], say=_say)
    page = write(card, outcomes, folder=options.pages, commit=_commit(), date=datetime.now(UTC).date().isoformat())
    failed = [outcome.check.name for outcome in outcomes if not outcome.passed]
    print(f"{page}: " + (f"failed: {', '.join(failed)}" if failed else "all checks passed"))
    return int(bool(failed))


def _say(line: str) -> None:
    print(line, flush=True)


def _commit() -> str:
    """The commit, and whether something is not committed."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
