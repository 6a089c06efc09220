"""Which pairs a reward model learns from, and which are held out."""

from __future__ import annotations

import pytest
import torch

from alignment.core.errors import DataError
from alignment.stages.reward.run import split
from alignment.stages.shared.preference_pairs import TokenizedPair

PAIRS = [TokenizedPair(prompt=[number % 5, 7], chosen=[number], rejected=[number, 2]) for number in range(12)]


def _split(fraction: float) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    return split(PAIRS, fraction, torch.Generator().manual_seed(0), where="stages.reward")


def test_a_prompt_is_learned_from_or_held_out() -> None:
    learned, held_out = _split(0.4)
    prompts = [{tuple(pair.prompt) for pair in part} for part in (learned, held_out)]
    assert [len(part) for part in prompts] == [3, 2]
    assert not prompts[0] & prompts[1]
    assert sorted(pair.chosen for pair in [*learned, *held_out]) == [[number] for number in range(12)]


def test_nothing_is_held_out_unless_asked_for_and_too_few_prompts_are_refused() -> None:
    assert _split(0.0) == (PAIRS, [])
    with pytest.raises(DataError, match=r"5 prompts are too few to hold out a share of 0\.05"):
        _split(0.05)
