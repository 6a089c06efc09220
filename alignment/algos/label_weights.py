"""Weights of desirable and undesirable answers that make up for unequal numbers (Ethayarajh et al. 2024, eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_RATIO, GREATEST_RATIO = 1.0, 4 / 3
"""Bounds on λ_D n_D / (λ_U n_U), which the paper recommends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelWeights:
    """λ_D and λ_U."""

    desirable: float
    undesirable: float

    def ratio(self, num_desirable: int, num_undesirable: int) -> float:
        """λ_D n_D / (λ_U n_U)."""
        return self.desirable * num_desirable / (self.undesirable * num_undesirable)


def label_weights(
    num_desirable: int, num_undesirable: int, *, desirable: float | None, undesirable: float | None
) -> LabelWeights:
    """The weights, where one that is None is the nearest to 1 that brings the ratio within its bounds. If both are
    None, only one of them is changed, and raised. Example: 10 desirable and 30 undesirable answers give λ_D = 3 and λ_U
    = 1, and 40 and 10 give λ_D = 1 and λ_U = 3. Both numbers must be positive."""
    at_one = LabelWeights(desirable=desirable or 1.0, undesirable=undesirable or 1.0)
    ratio = at_one.ratio(num_desirable, num_undesirable)
    excess = ratio / min(max(ratio, LEAST_RATIO), GREATEST_RATIO)
    if desirable is None and (undesirable is not None or excess < 1.0):
        return LabelWeights(desirable=at_one.desirable / excess, undesirable=at_one.undesirable)
    if undesirable is None:
        return LabelWeights(desirable=at_one.desirable, undesirable=at_one.undesirable * excess)
    return at_one
