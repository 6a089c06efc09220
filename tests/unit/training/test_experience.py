"""Which prompts an update uses, and how a stream of answer tokens becomes rows."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from alignment.rewards.scores import Scores
from alignment.training.rl.experience import (
    Answers,
    Readings,
    in_rows,
    interleave,
    partition_of,
    prompt_order,
    response_mask,
    rows_of,
    spread,
    stack,
)


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
    rows = [_answers([row]) for row in range(6)]
    whole = _answers(list(range(6)))
    shares = [_answers(list(range(rank, 6, world))) for rank in range(world)]
    assert plain(interleave(shares, group=1)) == plain(whole)
    assert plain(interleave(rows, group=1)) == plain(whole)


def test_answers_to_one_prompt_stay_together_in_the_batch() -> None:
    shares = [_answers(rows_of([0, 2], 3)), _answers(rows_of([1, 3], 3))]
    assert plain(interleave(shares, group=3)) == plain(_answers(list(range(12))))


@pytest.mark.parametrize(("learned", "world"), [([3, 0, 4, 1, 2], 1), ([3, 0, 4], 2), ([], 2), ([2], 3)])
def test_readings_go_back_into_the_order_of_the_rows(learned: list[int], world: int) -> None:
    """Also those of prompts that no minibatch learns from."""
    prompts = [[prompt] * 9 for prompt in range(5) for _ in range(2)]
    answers = [[row] * (1 + row % 3) for row in range(10)]
    cut = partition_of(prompts, answers, learned, group=2, num_minibatches=2, world_size=world, tokens=22)
    every = [row for rank in range(world) for rows in cut.of_rank(rank) for row in rows]
    assert sorted(every) == list(range(10))
    assert {row // 2 for number in range(2) for row in cut.rows_of(number)} == set(learned)
    shares = [[float(row) for rows in cut.of_rank(rank) for row in rows] for rank in range(world)]
    named = [Readings(logprobs=own, reference_logprobs=own, entropy=own, values=None) for own in shares]
    assert in_rows(named, cut).logprobs == [float(row) for row in range(10)]
    assert in_rows(named, cut).values is None


@pytest.mark.parametrize("world", [1, 2])
def test_every_process_has_as_many_micro_batches_in_a_minibatch(world: int) -> None:
    """Each is a collective call; the prompts are taken in their order."""
    answers = [[1] * length for length in (30, 1, 1, 30, 1, 1)]
    cut = partition_of([[1]] * 6, answers, [5, 0, 1, 2, 3], group=1, num_minibatches=2, world_size=world, tokens=31)
    assert [sorted(cut.rows_of(number)) for number in range(2)] == [[0, 1, 5], [2, 3]]
    assert cut.unlearned == ([[[4]]] if world == 1 else [[[4]], []])
    assert all(len({len(share) for share in minibatch}) == 1 for minibatch in cut.minibatches)


def _answers(rows: list[int]) -> Answers:
    """Numbers that name their row."""
    ids = [[row] for row in rows]
    logprobs = [torch.tensor(float(row)) for row in rows]
    return Answers(rows=rows, prompts=ids, answers=ids, versions=rows, scores=_scores(rows), sampled_logprobs=logprobs)


def _scores(rows: list[int]) -> Scores:
    numbers = torch.tensor(rows, dtype=torch.float32)
    return Scores.of({"rule": numbers, "other": -numbers})


def plain(rollout: Answers) -> dict[str, Any]:
    """For comparison: tensors do not compare as a whole."""
    lists = {field.name: getattr(rollout, field.name) for field in fields(Answers)}
    return lists | {"scores": [rollout.scores.of_answer(row) for row in range(len(rollout.rows))]}


def test_rows_are_stacked_as_a_stream_is_spread() -> None:
    mask = response_mask([[7, 8], [9]])
    assert stack([torch.tensor([1.0, 2.0]), torch.tensor([3.0])], mask).tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_spreading_hands_gradients_back_in_order() -> None:
    flat = torch.ones(3, requires_grad=True)
    weights = torch.tensor([[2.0, 9.0], [3.0, 4.0]])
    (spread(flat, torch.tensor([[True, False], [True, True]])) * weights).sum().backward()
    assert flat.grad.tolist() == [2.0, 3.0, 4.0]
