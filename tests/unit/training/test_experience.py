"""What an update of PPO learns from, which prompts, rows and metrics it has, and the policy's loss (tests/oracles)."""

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

from alignment.algos.ppo import truncated_importance
from alignment.records.training import MetricsLog
from alignment.rewards.scorers import Scores
from alignment.stages.ppo.experience import (
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
from alignment.stages.ppo.objective import Average, PolicyLoss, PolicyObjective, Sampled
from alignment.stages.ppo.step_metrics import UpdateMetrics
from tests.launches import Waits
from tests.oracles import importance as oracle
from tests.oracles.close import close


def _generator(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + number)


@pytest.mark.parametrize("batch", [3, 10])
def test_every_prompt_comes_once_a_pass_in_an_order_that_a_resumed_run_repeats(batch: int) -> None:
    episodes = [
        prompt for start in range(0, 70, batch) for prompt in prompt_order(7, start, min(batch, 70 - start), _generator)
    ]
    passes = [tuple(episodes[start : start + 7]) for start in range(0, 70, 7)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len(set(passes)) == len(passes)
    assert prompt_order(7, 13, 57, _generator) == episodes[13:]


def test_a_stream_is_spread_over_rows_and_is_zero_beside_them() -> None:
    mask = response_mask([[2, 2], [2], [0, 2, 6]])
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]], "whatever the token ids"
    flat = torch.arange(1.0, 7.0, requires_grad=True)
    by_row = spread(flat, mask)
    assert by_row.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0], [4.0, 5.0, 6.0]]
    assert torch.equal(stack([torch.arange(1.0, 3.0), torch.tensor([3.0]), torch.arange(4.0, 7.0)], mask), by_row)
    (by_row * torch.arange(9.0).view(3, 3)).sum().backward()
    assert flat.grad.tolist() == [0.0, 1.0, 3.0, 6.0, 7.0, 8.0], "gradients come back in order"


@pytest.mark.parametrize(("world", "group"), [(1, 1), (2, 1), (3, 1), (6, 1), (2, 3)])
def test_shares_of_processes_go_back_into_the_order_of_the_batch(world: int, group: int) -> None:
    """Answers to one prompt stay together."""
    shares = [_answers(rows_of(range(rank, 6 // group * group, world), group)) for rank in range(world)]
    assert plain(interleave(shares, group=group)) == plain(_answers(list(range(6 // group * group * group))))


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
    ids = [[row] for row in rows]
    logprobs = [torch.tensor(float(row)) for row in rows]
    return Answers(rows=rows, prompts=ids, answers=ids, versions=rows, scores=_scores(rows), sampled_logprobs=logprobs)


def _scores(rows: list[int]) -> Scores:
    numbers = torch.tensor(rows, dtype=torch.float32)
    return Scores.of({"rule": numbers, "other": -numbers})


def plain(rollout: Answers) -> dict[str, Any]:
    lists = {field.name: getattr(rollout, field.name) for field in fields(Answers)}
    return lists | {"scores": [rollout.scores.of_answer(row) for row in range(len(rollout.rows))]}


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
    log.append(4, {"loss": math.nan, "grad_norm": math.inf})
    assert math.isnan(log.last()["loss"])
    assert log.last()["grad_norm"] == math.inf


@pytest.mark.parametrize(("through", "remaining"), [(0, []), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5])])
def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path: Path, through: int, remaining: list[int]) -> None:
    log = _filled(tmp_path / "metrics.jsonl", 5)
    log.keep_through(through)
    assert [row["step"] for row in log.rows()] == remaining


@pytest.mark.parametrize(
    "half",
    [b'{"step": 6, "lo', '{"step": 6, "note": "é'.encode()[:-1], b'{"loss": 1.0}', b"\0\0", b"[6]", b'{"step": "six"}'],
)
def test_a_line_that_is_no_step_is_dropped(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    log = _filled(path, 5)
    with path.open("ab") as stream:
        stream.write(half)
    log.keep_through(10)
    log.append(6, {"loss": 0.1})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


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


@pytest.mark.parametrize(("processes", "count"), [("alone", 1), ("two equal ones", 2)])
def test_shares_of_micro_batches_and_processes_add_up_and_are_averaged_over_steps(processes: str, count: int) -> None:
    """Maxima and seconds gather over an update and end with it; nothing is read before."""
    figures = UpdateMetrics(PROCESSES[processes])
    with Waits() as waits:
        for micro_batches, worst in (([0.25, 0.5], 3.0), ([0.125, 0.125], 7.0), ([0.5, 0.0], 5.0)):
            for share in micro_batches:
                figures.add_share({"loss": torch.tensor(share), "policy/approxkl": torch.tensor(share)})
            figures.add_maximum("worst", torch.tensor(worst))
            figures.add_seconds("learning", 0.5)
            figures.step_done()
    assert waits.number == 0
    result = figures.result()
    close([result["loss"], result["policy/approxkl"]], [0.5 * count] * 2)
    assert result["policy/approxkl_first"] == 0.75 * count, "that of the first step is kept apart"
    assert (result["worst"], result["time/learning"]) == (7.0, 1.5)
    figures.clear()
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.step_done()
    assert not {"worst", "time/learning"} & set(figures.result())


def test_a_maximum_is_that_of_all_processes() -> None:
    figures = UpdateMetrics(PROCESSES["beside a higher one"])
    figures.add_share({"loss": torch.tensor(1.0)})
    figures.add_maximum("worst", torch.tensor(-1.0))
    figures.step_done()
    assert figures.result()["worst"] == 9.0


def test_the_approximate_kl_is_that_of_the_last_minibatch_whenever_it_is_read() -> None:
    figures = UpdateMetrics(PROCESSES["alone"])
    for shares, read in (([0.5, 0.25], True), ([0.125], False), ([2.0, 1.0], True)):
        for share in shares:
            figures.add_share({"policy/approxkl": torch.tensor(share)})
        figures.step_done()
        if read:
            assert figures.approximate_kl() == figures.approximate_kl() == sum(shares)


LENGTHS, LONGEST = [2, 8], 10
MASK = torch.arange(8) < torch.tensor(LENGTHS)[:, None]


def objective(average: Average, **changes: object) -> PolicyObjective:
    settings = {
        "average": average,
        "whole_answers": False,
        "clip": 0.2,
        "clip_high": 0.2,
        "max_new_tokens": LONGEST,
        "kl_in_loss": False,
        "entropy_coefficient": 0.0,
    }
    return PolicyObjective(**(settings | changes))  # type: ignore[arg-type]


def loss_of(
    wanted: PolicyObjective, logprobs: Tensor, *, advantages: Tensor | None = None, kl: float = 0.0
) -> PolicyLoss:
    old = logprobs.detach()
    sampled = Sampled(
        logprobs=old,
        reference_logprobs=old,
        advantages=MASK.double() if advantages is None else advantages,
        response_mask=MASK,
    )
    tokens = MASK.sum().double()
    return wanted.loss(
        logprobs, torch.zeros_like(old), sampled, kl_coefficient=kl, divisor=wanted.divisor(MASK), tokens=tokens
    )


@pytest.mark.parametrize(
    ("average", "whole", "short", "long"),
    [
        (Average.tokens, False, 1 / 10, 1 / 10),
        (Average.token_means, False, 1 / (2 * 2), 1 / (2 * 8)),
        (Average.constant_length, False, 1 / (2 * LONGEST), 1 / (2 * LONGEST)),
        (Average.token_sums, True, 1 / 2, 1 / 2),
    ],
    ids=["PPO", "GRPO", "Dr. GRPO", "RLOO"],
)
def test_a_token_of_a_long_answer_weighs_less_in_grpo_alone(
    average: Average, whole: bool, short: float, long: float
) -> None:
    """Two answers of equal reward, of two and of eight tokens (Liu et al. 2025, section 3.1: a wrong answer is
    punished less the longer it is)."""
    logprobs = torch.full((2, 8), -1.0, dtype=torch.float64, requires_grad=True)
    loss_of(objective(average, whole_answers=whole), logprobs).total.backward()
    expected = -torch.tensor([[short], [long]]) * MASK
    close(logprobs.grad, expected, rtol=1e-6)


def test_an_endless_divisor_gives_zero_and_finite_gradients() -> None:
    wanted = objective(Average.token_means, kl_in_loss=True, entropy_coefficient=0.5)
    logprobs = torch.full((2, 8), -1.0, requires_grad=True)
    endless = torch.tensor(float("inf"))
    sampled = Sampled(
        logprobs=logprobs.detach(),
        reference_logprobs=logprobs.detach() - 0.5,
        advantages=MASK.float(),
        response_mask=MASK,
    )
    loss = wanted.loss(logprobs, logprobs * 0.1, sampled, kl_coefficient=0.3, divisor=endless, tokens=endless)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert logprobs.grad.abs().max() == 0.0


ROW_LENGTHS, MOST, CAP, CLIP, CLIP_HIGH = [3, 6, 1, 4], 8, 1.1, 0.1, 0.2
ROW_MASK = torch.arange(6) < torch.tensor(ROW_LENGTHS)[:, None]
ADVANTAGES = [1.5, -0.7, 0.4, -2.0]
METHODS = {
    "ppo": (Average.tokens, False),
    "grpo": (Average.token_means, False),
    "dr_grpo": (Average.constant_length, False),
    "rloo": (Average.token_sums, True),
}


def drawn(seed: int, scale: float, around: Tensor | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    noise = scale * torch.randn(4, 6, generator=rng, dtype=torch.float64)
    return (noise - 2.0 if around is None else noise + around) * ROW_MASK


OLD = drawn(0, 0.5)
ENGINE = drawn(1, 0.3, OLD)
NEW = drawn(2, 0.2, OLD)


def _loss_of(method: str, logprobs: Tensor, weights: Tensor | None, *, kl: float = 0.0) -> Any:
    average, whole = METHODS[method]
    wanted = objective(
        average, whole_answers=whole, clip=CLIP, clip_high=CLIP_HIGH, max_new_tokens=MOST, kl_in_loss=True
    )
    sampled = Sampled(
        logprobs=OLD,
        reference_logprobs=OLD - 0.3 * ROW_MASK,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None] * ROW_MASK,
        response_mask=ROW_MASK,
        importance=weights,
    )
    return wanted.loss(
        logprobs,
        torch.zeros_like(OLD),
        sampled,
        kl_coefficient=kl,
        divisor=wanted.divisor(ROW_MASK).double(),
        tokens=ROW_MASK.sum().double(),
    )


def importance(method: str, engine: Tensor = ENGINE) -> Tensor:
    return truncated_importance(OLD, engine, ROW_MASK, cap=CAP, whole_answers=METHODS[method][1])


def rows(figures: Tensor) -> list[list[float]]:
    return [row[:length] for row, length in zip(figures.tolist(), ROW_LENGTHS, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradient_are_weighted_by_the_truncated_ratio(method: str) -> None:
    weights = importance(method)
    assert 0.0 < float((weights[ROW_MASK] >= CAP - 1e-9).double().mean()) < 1.0, "the cap should bind somewhere"
    logprobs = NEW.clone().requires_grad_()
    loss = _loss_of(method, logprobs, weights)
    loss.total.backward()
    plain = NEW.clone().requires_grad_()
    expected = oracle.policy_loss(
        method,
        [row[:length] for row, length in zip(plain, ROW_LENGTHS, strict=True)],
        rows(OLD),
        rows(ENGINE),
        ADVANTAGES,
        cap=CAP,
        low=CLIP,
        high=CLIP_HIGH,
        longest=MOST,
        exp=torch.exp,
    )
    expected.backward()
    close(loss.policy, expected.detach())
    close(logprobs.grad, plain.grad)
    assert float(logprobs.grad[ROW_MASK].abs().max()) > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_kl_in_the_loss_is_not_weighted_and_nothing_is_on_policy(method: str) -> None:
    """The KL is that of the policy, whoever sampled; so are the ratios that are reported."""
    weighted, plain = _loss_of(method, NEW, importance(method), kl=0.5), _loss_of(method, NEW, None, kl=0.5)
    assert float(weighted.kl) == float(plain.kl)
    assert torch.equal(weighted.ratio, plain.ratio)
    assert float(weighted.policy) != float(plain.policy)
    assert torch.equal(_loss_of(method, NEW, importance(method, OLD), kl=0.5).total, plain.total)
