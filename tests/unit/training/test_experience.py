"""Which prompts an update uses, how streams of tokens become rows, and how its metrics are gathered and logged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignment.records.step_log import MetricsLog
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
from alignment.training.rl.step_metrics import UpdateMetrics
from tests.launches import Waits
from tests.oracles.close import close


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 25])
def test_every_prompt_comes_once_a_pass_and_each_pass_has_another_order(batch: int) -> None:
    episodes = [
        prompt for start in range(0, 70, batch) for prompt in prompt_order(7, start, min(batch, 70 - start), _generator)
    ]
    passes = [tuple(episodes[start : start + 7]) for start in range(0, 70, 7)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len(set(passes)) == len(passes)


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


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _filled(path: Path, steps: int) -> MetricsLog:
    log = MetricsLog(path)
    for step in range(1, steps + 1):
        log.append(step, {"loss": 1.0 / step})
    return log


def test_a_step_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.keep_through(3)
    assert log.last() == {}
    assert not path.exists()
    log.append(3, {"loss": 2.0123456789, "lr": 1e-4, "note": "x", "count": 7})
    assert path.read_text() == '{"step": 3, "loss": 2.01235, "lr": 0.0001, "note": "x", "count": 7}\n'


def test_numbers_that_are_not_finite_stay_visible(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": float("nan"), "grad_norm": float("inf")})
    assert math.isnan(log.last()["loss"])
    assert log.last()["grad_norm"] == math.inf


@pytest.mark.parametrize(
    ("through", "remaining"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path: Path, through: int, remaining: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    _filled(path, 5).keep_through(through)
    assert _steps(path) == remaining


@pytest.mark.parametrize(
    "half",
    [
        b'{"step": 6, "lo',
        '{"step": 6, "note": "é'.encode()[:-1],
        *(b'{"loss": 1.0}', b"", b"\0\0\0\0", b"7", b"[6]", b'{"step": null}', b'{"step": "six"}'),
    ],
)
def test_a_line_that_is_no_step_is_dropped(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    log = _filled(path, 5)
    with path.open("ab") as stream:
        stream.write(half)
    log.keep_through(10)
    log.append(6, {"loss": 0.1})
    assert _steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_line_ends_where_it_was_ended_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"step": 1, "answer": "one\u2028two\x85"}\n', encoding="utf-8")
    log = MetricsLog(path)
    log.keep_through(1)
    assert log.rows() == [{"step": 1, "answer": "one\u2028two\x85"}]


PROCESSES: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda values: values[None],
    "two equal ones": lambda values: torch.stack([values, values]),
    "beside a higher one": lambda values: torch.stack([values, values + 10.0]),
}


@pytest.mark.parametrize("processes", ["alone", "two equal ones"])
def test_means_are_over_counted_tokens_of_all_processes(processes: str) -> None:
    figures = UpdateMetrics(PROCESSES[processes])
    values, mask = torch.tensor([[1.0, 5.0, 99.0], [3.0, 99.0, 99.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    figures.add_means({"x": values, "y": -values}, mask)
    close(figures.values["x"], 3.0)
    close(figures.values["y"], -3.0)


@pytest.mark.parametrize(("processes", "mean"), [("alone", 0.5), ("two equal ones", 1.0)])
def test_shares_of_micro_batches_and_processes_add_up_and_are_averaged_over_steps(processes: str, mean: float) -> None:
    figures = UpdateMetrics(PROCESSES[processes])
    for micro_batches in ([0.25, 0.5], [0.125, 0.125]):
        for share in micro_batches:
            figures.add_share({"loss": torch.tensor(share)})
        figures.step_done()
    close(figures.result()["loss"], mean)


def test_shares_and_maxima_of_all_minibatches_are_read_together() -> None:
    figures = UpdateMetrics(PROCESSES["alone"])
    shares = {str(number): torch.tensor(float(number)) for number in range(5)} | {"policy/approxkl": torch.zeros(())}
    with Waits() as waits:
        for worst in (3.0, 7.0, 5.0):
            figures.add_share(shares)
            figures.add_maximum("worst", torch.tensor(worst))
            figures.step_done()
    assert waits.number == 0
    assert [figures.result()[str(number)] for number in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert figures.result()["worst"] == 7.0


def test_the_approximate_kl_is_that_of_the_last_minibatch_whenever_it_is_read() -> None:
    figures = UpdateMetrics(PROCESSES["alone"])
    for shares, read in (([0.5, 0.25], True), ([0.125], False), ([2.0, 1.0], True)):
        for share in shares:
            figures.add_share({"policy/approxkl": torch.tensor(share)})
        figures.step_done()
        if read:
            assert figures.approximate_kl() == figures.approximate_kl() == sum(shares)


def test_the_approximate_kl_of_the_first_step_is_kept_apart() -> None:
    figures = UpdateMetrics(PROCESSES["two equal ones"])
    for kl in (0.125, 0.5, 0.125):
        figures.add_share({"policy/approxkl": torch.tensor(kl)})
        figures.step_done()
    averages = figures.result()
    assert averages["policy/approxkl_first"] == 0.25, "of all processes"
    close(averages["policy/approxkl"], 0.5)


def test_maxima_and_seconds_gather_over_an_update_and_end_with_it() -> None:
    figures = UpdateMetrics(PROCESSES["beside a higher one"])
    for value in (-3.0, -1.0, -2.0):
        figures.add_maximum("worst", torch.tensor(value))
        figures.add_seconds("learning", 0.5)
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.step_done()
    assert figures.result()["worst"] == 9.0
    assert figures.result()["time/learning"] == 1.5
    figures.clear()
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.step_done()
    assert not {"worst", "time/learning"} & set(figures.result())
