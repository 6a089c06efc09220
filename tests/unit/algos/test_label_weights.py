"""Weights that make up for unequal numbers of labels, against the paper's bounds."""

from __future__ import annotations

import pytest

from alignment.algos.sampling import label_weights


@pytest.mark.parametrize(
    ("counts", "given", "expected"),
    [
        ((10, 10), (None, None), (1.0, 1.0)),
        ((12, 10), (None, None), (1.0, 1.0)),  # 1.2 is within the bounds
        ((10, 100), (None, None), (10.0, 1.0)),  # the paper's example: λ_D from 10 to 13.3
        ((40, 10), (None, None), (1.0, 3.0)),
        ((10, 10), (2.0, None), (2.0, 1.5)),
        ((10, 10), (0.5, None), (0.5, 0.5)),
        ((10, 10), (None, 2.0), (2.0, 2.0)),
        ((10, 10), (None, 0.25), (1 / 3, 0.25)),
        ((10, 12), (None, 0.8), (1.0, 0.8)),  # 1.04
        ((10, 100), (5.0, 0.5), (5.0, 0.5)),  # as they were set
    ],
)
def test_a_weight_that_is_null_brings_the_ratio_within_its_bounds(
    counts: tuple[int, int], given: tuple[float | None, float | None], expected: tuple[float, float]
) -> None:
    weights = label_weights(*counts, desirable=given[0], undesirable=given[1])
    assert (weights.desirable, weights.undesirable) == pytest.approx(expected)
    if None in given:
        ratio = expected[0] * counts[0] / (expected[1] * counts[1])
        assert weights.ratio(*counts) == pytest.approx(ratio)
        assert 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9
