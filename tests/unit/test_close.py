"""The helper that bounds tolerances."""

from __future__ import annotations

import pytest

from tests.oracles.close import close


@pytest.mark.parametrize("tolerance", [{"rtol": 1e-3}, {"atol": 1e-3}])
def test_a_loose_tolerance_is_refused(tolerance: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="too loose"):
        close([1.0], [1.0], **tolerance)


@pytest.mark.parametrize("wrong", [[1.0, 2.1], [1.0], [[1.0, 2.0]], [1.0, float("nan")]])
def test_other_numbers_and_other_shapes_are_noticed(wrong: list[float]) -> None:
    with pytest.raises(AssertionError):
        close(wrong, [1.0, 2.0])
