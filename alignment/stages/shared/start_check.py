"""Whether a reference is the policy that a stage starts from, answer by answer, before anything is learned.

A mean loss would hide an error that the answers share, and at a small beta most of any error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from alignment.core.errors import StageError
from alignment.costs.recorder import on_shadows
from alignment.training.sharding import everyones

START_TOLERANCE = 1e-3
"""How far policy and reference may differ on a row at step 0, relative to its log-probability divided by the root of
its number of tokens, because rounding errors of tokens are independent. Both are computed in the same micro-batch: in
bfloat16, the other rows of a micro-batch change the log-probability of an answer by some tenths of a nat."""
ROUNDED_TOLERANCE = 0.2
"""The same for a reference in bfloat16 from other micro-batches, and for the median of the rows: rounding gives some
hundredths, and a reference of other rows a number above 1."""


@dataclass(frozen=True, slots=True)
class StartRow:
    """An answer's log-probabilities under policy and reference, in nats, and its number of tokens."""

    policy: float
    reference: float
    tokens: int

    @property
    def excess(self) -> float:
        """The relative difference; a log-probability counts as at least one nat per token, and NaN gives infinity."""
        size = max(abs(self.reference), float(self.tokens)) / self.tokens**0.5
        difference = abs(self.policy - self.reference)
        return math.inf if math.isnan(difference) else difference / size


def refuse_other_reference(own: Iterable[StartRow], *, is_rounded: bool = False) -> None:
    """Compares the answers of this process and of all others; every process must call this.

    ``is_rounded``: the reference was computed in bfloat16 in other micro-batches.

    Raises:
        StageError: policy and reference differ on an answer, so the stage does not start from the reference.
    """
    rows = sorted((row for rows in everyones(list(own)) for row in rows), key=lambda row: row.excess)
    worst = rows[len(rows) // 2] if is_rounded else rows[-1]
    if worst.excess > (ROUNDED_TOLERANCE if is_rounded else START_TOLERANCE) and not on_shadows():
        raise StageError(
            f"at step 0 policy and reference differ by {abs(worst.policy - worst.reference):.3g} nats on an answer of "
            f"{worst.tokens} tokens ({worst.policy:.6g} and {worst.reference:.6g}): the reference is not the starting "
            "policy",
            remedy="nothing was trained; report this with the stage.yaml of the run",
        )
