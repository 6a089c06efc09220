"""Ensembles and penalties for length, against loops that follow their papers."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from alignment.algos import ppo, preferences
from tests.oracles import ensembles as ensembles_oracle
from tests.oracles import length_penalties as penalties_oracle

WAYS = {
    "mean": preferences.mean,
    "min": preferences.worst,
    "mean_minus_std": partial(preferences.mean_minus_std, weight=0.7),
}


@pytest.mark.parametrize("members", [2, 3, 5])
@pytest.mark.parametrize("how", WAYS)
def test_an_ensemble_gives_what_its_paper_says(how: str, members: int) -> None:
    scores = torch.randn(members, 6, generator=torch.Generator().manual_seed(members), dtype=torch.float64) * 3 + 1
    expected = ensembles_oracle.combined(scores.tolist(), how, weight=0.7)
    assert WAYS[how](scores).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_members_that_agree_lose_nothing() -> None:
    scores = torch.tensor([[2.0, -1.0], [2.0, -1.0]], dtype=torch.float64)
    for combine in WAYS.values():
        assert combine(scores).tolist() == [2.0, -1.0]
    assert preferences.spread(scores).tolist() == [0.0, 0.0]
    assert preferences.spread(torch.tensor([[0.0], [4.0]], dtype=torch.float64)).tolist() == [2.0]


@pytest.mark.parametrize(("longest", "buffer"), [(12, 4), (12, 12), (5, 1), (100, 30)])
def test_an_overlong_answer_loses_what_dapo_says(longest: int, buffer: int) -> None:
    lengths = list(range(1, longest + 4))
    expected = [penalties_oracle.overlong(length, longest=longest, buffer=buffer) for length in lengths]
    penalty = ppo.of_overlong(torch.tensor(lengths), longest=longest, buffer=buffer)
    assert (-penalty).tolist() == pytest.approx(expected, abs=1e-15)
    assert penalty.dtype == torch.float64
    assert penalty[longest - 1] == 1.0


def test_every_token_costs_the_same() -> None:
    penalty = ppo.of_each_token(torch.tensor([1, 3, 40]), 0.05)
    assert penalty.tolist() == pytest.approx([0.05, 0.15, 2.0], abs=1e-15)
