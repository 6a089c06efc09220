"""Scores that depend on nothing but their row, and models in which they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignment.evaluation.invariance import Rows, beyond_rounding, flat_scores, moved, padded_scores
from alignment.models.forward.flat import use_flat_attention
from alignment.records.reward_card import Change, Rescored
from tests.tiny import ARCHITECTURES, tiny_scorer

CPU = torch.device("cpu")
CHANGES = ["alone", "in another order", "padded on the left", "padded on the right"]


def rows() -> list[list[int]]:
    """Four pairs behind common prompts, of different lengths."""
    rng = torch.Generator().manual_seed(0)
    sequences = []
    for length in (20, 40, 30, 18):
        prompt = torch.randint(3, 120, (length,), generator=rng).tolist()
        sequences += [prompt + torch.randint(3, 120, (more,), generator=rng).tolist() for more in (4, 9)]
    return sequences


def measured(model: Any, sequences: Rows) -> Rescored:
    return moved(
        lambda rows: flat_scores(model, rows, tokens=100, device=CPU),
        lambda rows, left: padded_scores(model, rows, left=left, device=CPU),
        sequences,
        torch.Generator().manual_seed(1),
    )


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_a_score_depends_on_its_row_alone(architecture: str) -> None:
    model = tiny_scorer(architecture)
    use_flat_attention(model)
    rescored = measured(model, rows())
    assert list(rescored.changes) == CHANGES
    assert rescored.spread > 0.01
    assert beyond_rounding(rescored) == []
    assert all(change.flips == 0 for change in rescored.changes.values())


def test_what_a_model_goes_by_besides_its_row_is_named() -> None:
    honest = torch.arange(8.0)

    def by_position(rows: Rows) -> torch.Tensor:
        return torch.tensor([float(len(row)) + position for position, row in enumerate(rows)])

    def padded(rows: Rows, left: bool) -> torch.Tensor:
        return by_position(rows) + (0.5 if left else 0.0)

    rescored = moved(by_position, padded, [[1] * (1 + int(n)) for n in honest], torch.Generator().manual_seed(1))
    assert beyond_rounding(rescored) == ["alone", "in another order", "padded on the left"]
    assert rescored.changes["alone"].largest == 7.0
    assert rescored.changes["padded on the left"] == Change(largest=0.5, flips=0)
    assert rescored.changes["in another order"].flips > 0


def test_a_score_that_is_no_number_is_not_taken_for_steady() -> None:
    rescored = moved(lambda rows: torch.full((len(rows),), torch.nan), None, [[1], [2]], torch.Generator())
    assert beyond_rounding(rescored) == ["alone", "in another order"]
