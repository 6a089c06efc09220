"""``make field ARGS="--draws 300"``: draws runs, checks each, and writes down those that fail.

A failing draw prints the command that repeats it. With ``--shrink``, the first failure is made as small as possible.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.e2e.conftest import environment
from tests.e2e.forked import Forked
from tests.field.draws import Draw, draws
from tests.field.runs import Field, Refused
from tests.field.truths import check

FAILURES = Path("build/field")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.field", description=__doc__)
    parser.add_argument("--draws", type=int, default=60, help="how many runs are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--again", type=Path, metavar="DRAW.json", help="checks one draw that was written down")
    parser.add_argument("--shrink", action="store_true", help="stops at the first failure and makes it smaller")
    options = parser.parse_args()
    forked = Forked({**environment(), "OMP_NUM_THREADS": "1"})
    try:
        if options.again is not None:
            return int(not Trial(forked).holds(Draw.read(options.again)))
        draw_all = shrink if options.shrink else run
        return draw_all(Trial(forked), number=options.draws, seed=options.seed)
    finally:
        forked.close()


class Trial:
    """Checks draws, and counts how they ended."""

    def __init__(self, forked: Forked) -> None:
        self._forked = forked
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failed: list[Path] = []

    def holds(self, draw: Draw) -> bool:
        """Whether everything is true of the draw; its folder is kept if not."""
        folder = Path(tempfile.mkdtemp(prefix="field-"))
        started = time.monotonic()
        try:
            check(Field(folder, self._forked), draw)
            outcome = "held"
        except Refused as refusal:
            outcome = "refused"
            print(f"refused: {str(refusal).strip()[-300:]}", flush=True)
        except Exception as error:  # noqa: BLE001  whatever it is, the draw is written down
            outcome = "failed"
            self._keep(draw, folder, error)
        self.outcomes[outcome] += 1
        shutil.rmtree(folder, ignore_errors=True)
        print(
            f"{sum(self.outcomes.values())} {outcome} in {time.monotonic() - started:.0f} s: {summary(draw)}",
            flush=True,
        )
        return outcome != "failed"

    def _keep(self, draw: Draw, folder: Path, error: Exception) -> None:
        failure = FAILURES / folder.name
        shutil.copytree(folder / "run", failure, dirs_exist_ok=True, ignore=shutil.ignore_patterns("artifacts"))
        draw.write(failure / "draw.json")
        (failure / "error.txt").write_text("".join(traceback.format_exception(error)))
        self.failed.append(failure)
        print(f"FAILED {type(error).__name__}: {str(error)[:1500]}", file=sys.stderr)
        print(
            f"recipe: {failure}/recipe.yaml\nagain: python -m tests.field --again {failure}/draw.json", file=sys.stderr
        )


def summary(draw: Draw) -> str:
    """A line."""
    adapters = "+".join(f"{name}/{stage['adapter']['kind']}" for name, stage in draw.stages.items())
    return f"{draw.architecture} {draw.dtype} {draw.processes}p {adapters}"


def run(trial: Trial, *, number: int, seed: int) -> int:
    """Checks so many draws; returns how many failed. Each comes from a seed of its own, because hypothesis follows up
    on a draw with others that are much like it."""
    drawn: list[Draw] = []
    while len(drawn) < number:
        seed_of_draw = 1000 * seed + len(drawn)
        _each(lambda draw, known=tuple(drawn): drawn.append(draw) if draw not in known else None, 2, seed_of_draw)
    for draw in drawn[:number]:
        trial.holds(draw)
    print(f"{dict(trial.outcomes)}; failed: {[str(folder) for folder in trial.failed]}")
    return len(trial.failed)


def shrink(trial: Trial, *, number: int, seed: int) -> int:
    """Stops at the first of so many draws that fails, and makes it smaller; returns whether there was one."""

    def must_hold(draw: Draw) -> None:
        assert trial.holds(draw)

    try:
        _each(must_hold, number, seed)
    except AssertionError:
        print(f"the smallest is in {trial.failed[-1]}")
        return 1
    return 0


def _each(check: Callable[[Draw], None], number: int, seed: int) -> None:
    settings = hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    hypothesis.seed(seed)(settings(hypothesis.given(draws())(lambda draw: check(draw))))()


if __name__ == "__main__":
    sys.exit(min(1, main()))
