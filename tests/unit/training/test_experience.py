"""Which prompts an update uses, and how a stream of answer tokens becomes rows."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from alignment.rewards.scores import Scores
from alignment.training.rl.experience import Rollout, interleave, prompt_order, response_mask, rows_of, spread, stack


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
def test_every_prompt_comes_once_a_pass(batch: int) -> None:
    episodes = [
        prompt for start in range(0, 70, batch) for prompt in prompt_order(7, start, min(batch, 70 - start), _generator)
    ]
    for number in range(10):
        assert sorted(episodes[7 * number : 7 * number + 7]) == list(range(7))


def test_passes_are_permuted_differently() -> None:
    orders = {tuple(prompt_order(12, 12 * number, 12, _generator)) for number in range(6)}
    assert len(orders) == 6


@pytest.mark.parametrize("start", [0, 5, 7, 13, 20])
def test_a_resumed_run_meets_the_same_prompts(start: int) -> None:
    assert prompt_order(7, start, 30 - start, _generator) == prompt_order(7, 0, 30, _generator)[start:]


def test_a_mask_follows_lengths_and_never_token_ids() -> None:
    assert response_mask([[2, 2, 2], [2], [0, 2]]).tolist() == [
        [True, True, True],
        [True, False, False],
        [True, True, False],
    ]


def test_a_stream_is_spread_over_rows_and_is_zero_beside_them() -> None:
    mask = response_mask([[7, 8], [9], [4, 5, 6]])
    by_row = spread(torch.arange(1.0, 7.0), mask)
    assert by_row.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
    assert torch.equal(by_row[mask], torch.arange(1.0, 7.0))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_processes_go_back_into_the_order_of_the_batch(world: int) -> None:
    rows = [_rollout([row]) for row in range(6)]
    whole = _rollout(list(range(6)))
    shares = [_rollout(list(range(rank, 6, world))) for rank in range(world)]
    assert plain(interleave(shares, group=1)) == plain(whole)
    assert plain(interleave(rows, group=1)) == plain(whole)


def test_answers_to_one_prompt_stay_together_in_the_batch() -> None:
    shares = [_rollout(rows_of([0, 2], 3)), _rollout(rows_of([1, 3], 3))]
    assert plain(interleave(shares, group=3)) == plain(_rollout(list(range(12))))


def _rollout(rows: list[int]) -> Rollout:
    """Figures that name their row."""
    kinds = ("logprobs", "sampled_logprobs", "reference_logprobs", "entropy", "values")
    named = {name: [float(row) for row in rows] for name in kinds}
    ids = [[row] for row in rows]
    return Rollout(rows=rows, prompts=ids, answers=ids, versions=rows, scores=_scores(rows), **named)


def _scores(rows: list[int]) -> Scores:
    numbers = torch.tensor(rows, dtype=torch.float32)
    return Scores.of({"rule": numbers, "other": -numbers})


def plain(rollout: Rollout) -> dict[str, Any]:
    """For comparison: tensors do not compare as a whole."""
    lists = {field.name: getattr(rollout, field.name) for field in fields(Rollout)}
    return lists | {"scores": [rollout.scores.of_answer(row) for row in range(len(rollout.rows))]}


def test_rows_are_stacked_as_a_stream_is_spread() -> None:
    mask = response_mask([[7, 8], [9]])
    assert stack([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], mask).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_spreading_hands_gradients_back_in_order() -> None:
    flat = torch.ones(3, requires_grad=True)
    weights = torch.tensor([[2.0, 9.0], [3.0, 4.0]])
    (spread(flat, torch.tensor([[True, False], [True, True]])) * weights).sum().backward()
    assert flat.grad.tolist() == [2.0, 3.0, 4.0]
