"""Tries what `make dist` built as a user would: ``make check-dist``.

The wheel is installed with all that it requires into an empty environment. A smoke run of the quickstart is run twice
in an empty folder; the second time every result is reused. Then pip resolves each extra, without installing it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.release.installed import ROOT, Installed, new_environment
from tests.release.test_distributions import PROJECT

SMOKE = ("run", "quickstart", "profile=smoke")


def trials(installed: Installed, wheel: Path) -> Iterator[tuple[str, str]]:
    """Each trial with what went wrong in it; empty if nothing did. The first failure of installing ends them."""
    done = installed.pip(str(wheel))
    yield f"pip install {wheel.name}", done.stdout if done.returncode else ""
    if done.returncode:
        return
    checked = installed.call(installed.python, "-m", "pip", "check")
    yield "pip check", checked.stdout if checked.returncode else ""
    yield "the first commands", "\n".join(installed.wrong_commands())
    first = installed.align(*SMOKE)
    report = installed.work / "runs" / "quickstart-smoke" / "report.html"
    yield f"align {' '.join(SMOKE)}", first.stdout if first.returncode or not report.is_file() else ""
    again = installed.align(*SMOKE)
    yield "the same again", again.stdout if again.returncode or "reused" not in again.stdout else ""
    for extra in PROJECT["optional-dependencies"]:
        resolved = installed.pip("--dry-run", f"{wheel}[{extra}]")
        yield f"pip install --dry-run [{extra}]", resolved.stdout if resolved.returncode else ""


def main() -> int:
    """Prints a line for each trial. Returns the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter of the new environment (default: ours)"
    )
    arguments = parser.parse_args()
    (wheel,) = (ROOT / "dist").glob("*.whl")
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        started = time.monotonic()
        for title, fault in trials(new_environment(Path(scratch), arguments.python), wheel):
            failures += bool(fault)
            print(
                f"{'FAILED' if fault else 'passed'}  {time.monotonic() - started:5.0f} s  {title}\n{fault}",
                end="",
                flush=True,
            )
    return failures


if __name__ == "__main__":
    sys.exit(main())
