"""``python -m tests.proofs``: runs the proofs, prints each figure with its bound, and writes docs/proofs.json.

The file is written after each proof, and each of its proofs names the run that it came from. A proof that was skipped
or not asked for stays as it is. Exit code: 0 all passed or were skipped, 1 one failed, 2 a wrong option.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import results_file
from tests.proofs.common import Claim, Skipped

RESULTS = Path(__file__).parents[2] / "docs/proofs.json"
PROOFS = (
    *("bandit", "critic_free", "count", "dpo", "kto", "overoptimisation", "interruptions"),
    *("forgetting", "rounds", "engines"),
)
"""Modules of this package, each with ``run(folder)``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a proof went. ``reason`` says why it was skipped or broke off, and is empty for one that ran to its end."""

    name: str
    state: str
    claims: tuple[Claim, ...]
    seconds: float
    reason: str

    def as_dict(self) -> dict[str, Any]:
        claims = [
            {
                "figure": claim.figure,
                "values": [float(f"{value:.6g}") for value in claim.values],
                "at_least": claim.at_least,
                "at_most": claim.at_most,
                "holds": claim.holds,
            }
            for claim in self.claims
        ]
        entry = {"name": self.name, "state": self.state, "seconds": round(self.seconds, 1), "claims": claims}
        return entry | ({"reason": self.reason} if self.reason else {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs", description=__doc__)
    parser.add_argument("--only", help=f"comma-separated: {', '.join(PROOFS)}")
    only = parser.parse_args(argv).only
    names = list(PROOFS) if only is None else only.split(",")
    if unknown := [name for name in names if name not in PROOFS]:
        parser.error(f"no proof {', '.join(unknown)}; there are {', '.join(PROOFS)}")
    _quiet()
    outcomes = []
    for name in names:
        outcomes.append(outcome := _tried(name))
        if outcome.state != "skipped":
            results_file.update(RESULTS, "proofs", [outcome.as_dict()], names=("name",))
    return int(any(outcome.state == "failed" for outcome in outcomes))


def _tried(name: str) -> Outcome:
    print(f"{name}", flush=True)
    started = time.monotonic()
    claims: list[Claim] = []
    state, reason = "failed", ""
    # Trainers print what they log.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            claims = importlib.import_module(f"tests.proofs.{name}").run(Path(folder))
            state = "passed" if claims and all(claim.holds for claim in claims) else "failed"
        except Skipped as why:
            state, reason = "skipped", str(why)
        except Exception as error:  # noqa: BLE001 - the other proofs are still worth running
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
    outcome = Outcome(name=name, state=state, claims=tuple(claims), seconds=time.monotonic() - started, reason=reason)
    for claim in claims:
        print(f"  {'ok ' if claim.holds else 'NOT'} {_line(claim)}")
    print(f"  {state} in {outcome.seconds:.0f} s{': ' if reason else ''}{reason}", flush=True)
    return outcome


def _line(claim: Claim) -> str:
    values = " ".join(f"{value:.4g}" for value in claim.values)
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", claim.at_least), ("≤", claim.at_most)) if bound is not None]
    return f"{claim.figure}: {values} ({', '.join(bounds)})"


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
