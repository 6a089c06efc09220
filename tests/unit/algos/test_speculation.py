"""Expected gains of speculative decoding against a sum over what can happen in a step."""

from __future__ import annotations

import pytest

from alignment.algos.sampling import expected_speed_up, tokens_per_step
from tests.oracles import distillation as oracle


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("acceptance", [0.0, 0.31, 0.8, 0.999])
def test_expected_tokens_and_speed_up_are_those_of_the_paper(acceptance: float, gamma: int) -> None:
    assert tokens_per_step(acceptance, gamma) == pytest.approx(oracle.tokens_per_step(acceptance, gamma), rel=1e-12)
    expected = oracle.speed_up(acceptance, gamma, 0.2)
    assert expected_speed_up(acceptance, gamma, 0.2) == pytest.approx(expected, rel=1e-12)


def test_a_perfect_draft_yields_all_tokens_and_a_useless_one_costs_time() -> None:
    assert tokens_per_step(1.0, 4) == 5.0
    assert tokens_per_step(0.0, 4) == 1.0
    assert expected_speed_up(1.0, 4, 0.0) == 5.0
    assert expected_speed_up(0.0, 4, 0.25) == 0.5
