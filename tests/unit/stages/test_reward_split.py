"""Which pairs a reward model learns from, and which are held out."""

from __future__ import annotations

import pytest
import torch

from alignment.core.errors import DataError
from alignment.stages.reward.run import split
from tests.pairs import TokenizedPair, as_pairs, as_table

PAIRS = [TokenizedPair(prompt=[number % 5, 7], chosen=[number], rejected=[number, 2]) for number in range(12)]


def _split(fraction: float) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    sides = split(as_table(PAIRS), fraction, torch.Generator().manual_seed(0), where="stages.reward")
    return as_pairs(sides[0]), as_pairs(sides[1])


def test_a_prompt_is_learned_from_or_held_out() -> None:
    learned, held_out = _split(0.4)
    prompts = [{tuple(pair.prompt) for pair in part} for part in (learned, held_out)]
    assert [len(part) for part in prompts] == [3, 2]
    assert not prompts[0] & prompts[1]
    assert sorted(pair.chosen for pair in [*learned, *held_out]) == [[number] for number in range(12)]


def test_which_prompts_are_held_out_depends_on_their_order_as_lists_of_tokens() -> None:
    """Not on the order of the pairs, nor on how the ids are kept."""
    prompts = [[1], [1, 300], [255], [256], [2, 1, 1], [70_000, 3]]
    pairs = as_table(TokenizedPair(prompt=prompt, chosen=[1], rejected=[2]) for prompt in reversed(prompts))
    _, held_out = split(pairs, 0.5, torch.Generator().manual_seed(0), where="")
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:3]
    assert sorted(held_out["prompt"]) == sorted(sorted(prompts)[index] for index in drawn)


def test_nothing_is_held_out_unless_asked_for_and_too_few_prompts_are_refused() -> None:
    assert _split(0.0) == (PAIRS, [])
    with pytest.raises(DataError, match=r"5 prompts are too few to hold out a share of 0\.05"):
        _split(0.05)
