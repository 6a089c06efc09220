"""Attention of many rows at once equals attention written as loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch

from alignment.models.kernels import row_attention
from alignment.models.kernels.row_attention import Row, Scores, attend

SHAPES = {
    "rows alone": (Row((0, 3), ((0, 3),)), Row((3, 4), ((3, 4),)), Row((4, 10), ((4, 10),))),
    "a shared beginning": (
        Row((0, 5), ((0, 5),)),
        Row((5, 7), ((0, 3), (5, 7))),
        Row((7, 10), ((0, 2), (5, 6), (7, 10))),
    ),
    "keys in front of the stream": (Row((0, 2), ((0, 4), (6, 8))), Row((2, 10), ((1, 3), (8, 16)))),
}
PLAIN = Scores(scale=0.3)
HOW = {
    "plain": PLAIN,
    "a window of 1": Scores(scale=0.3, window=1),
    "a window of 3": Scores(scale=0.3, window=3),
    "a window beyond all keys": Scores(scale=0.3, window=99),
    "capped": Scores(scale=0.9, cap=0.8),
    "a window and capped": Scores(scale=0.9, window=2, cap=0.8),
}


def _by_loops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: tuple[Row, ...], how: Scores
) -> torch.Tensor:
    """As the definition says it, one query at a time: it sees the keys before its own, and its own; the last ones."""
    parts = query.shape[0] // key.shape[0]
    out = []
    for head in range(query.shape[0]):
        attended = {}
        for row in rows:
            indices = [index for start, end in row.keys for index in range(start, end)]
            for number, token in enumerate(range(*row.own)):
                seen = indices[: len(indices) - row.queries + number + 1]
                seen = seen if how.window is None else seen[-how.window :]
                scores = torch.stack([query[head, token] @ key[head // parts, index] for index in seen]) * how.scale
                scores = scores if how.cap is None else how.cap * torch.tanh(scores / how.cap)
                attended[token] = torch.softmax(scores, 0) @ value[head // parts, seen]
        out.append(torch.stack([attended[token] for token in sorted(attended)]))
    return torch.stack(out)


LIMITS: list[dict[str, int]] = [{}, {"QUERIES": 4, "SPAN": 3}, {"QUERIES": 1, "SPAN": 1}, {"CALL": 0}, {"CALL": 10**9}]
"""Sizes of the parts in which the products are taken."""


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("rows", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_values_and_gradients_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, how: Scores, rows: tuple[Row, ...], heads: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    keys = max(end for row in rows for _, end in row.keys)
    shapes = (heads[0], 10, 8), (heads[1], keys, 8), (heads[1], keys, 5)
    inputs = [torch.randn(*shape, generator=rng).requires_grad_() for shape in shapes]
    exact_inputs = [states.detach().double().requires_grad_() for states in inputs]
    upstream = torch.randn(heads[0], 10, 5, generator=rng)
    expected = _by_loops(*exact_inputs, rows, how)  # type: ignore[call-arg]
    exact_gradients = torch.autograd.grad(expected, exact_inputs, upstream.double())
    for limits in LIMITS:
        with monkeypatch.context() as changed:
            for name, number in limits.items():
                changed.setattr(row_attention, name, number)
            row_attention._plan.cache_clear()
            attended = attend(*inputs, rows, how)  # type: ignore[call-arg]
            gradients = torch.autograd.grad(attended, inputs, upstream)
            row_attention._plan.cache_clear()
        for part, exact in zip((attended, *gradients), (expected, *exact_gradients), strict=True):
            torch.testing.assert_close(part, exact.float(), atol=1e-5, rtol=1e-5, msg=f"differs with {limits}")


def test_short_rows_share_a_product_and_long_ones_stand_alone() -> None:
    lengths = [90, 100, 30, 95, 28, 300, 33]
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    rows = tuple(Row((end - length, end), ((end - length, end),)) for length, end in zip(lengths, ends, strict=True))
    plan = row_attention._plan(rows, 3, torch.bfloat16, torch.device("cpu"))
    assert sorted(group.hidden.shape[1] for group in plan.stored) == [48, 112], "padded to a multiple of 16"
    assert sorted(group.matrices for group in plan.stored) == [9, 9]
    assert [row.queries for row, _ in plan.long] == [300]


def test_keys_before_a_window_are_left_out_of_a_long_rows_spans() -> None:
    rows = (Row((0, 1000), ((0, 1000),)),)
    plan = row_attention._plan(rows, 1, torch.bfloat16, torch.device("cpu"), 100, True)
    assert plan.long == ()
    assert {group.hidden.shape[2] - group.hidden.shape[1] for group in plan.recomputed} == {112}, "99 earlier keys"


def test_no_product_has_more_scores_than_it_may() -> None:
    rows = tuple(Row((200 * n, 200 * n + 200), ((200 * n, 200 * n + 200),)) for n in range(20))
    plan = row_attention._plan(rows, 1, torch.bfloat16, torch.device("cpu"))
    assert {group.hidden.shape for group in plan.stored} == {(1, 128, 128), (1, 80, 208)}, "spans of 128 and 72 queries"
    assert sum(group.matrices for group in plan.stored) == 2 * 20
    assert all(group.matrices * group.hidden[0].numel() <= row_attention.SCORES for group in plan.stored)


def test_what_is_no_number_stays_in_its_row() -> None:
    states = [torch.ones(2, 10, 8) for _ in range(3)]
    states[1][:, 0] = states[2][:, 0] = math.nan
    attended = attend(*states, (Row((0, 3), ((0, 3),)), Row((3, 10), ((3, 10),))), PLAIN)  # type: ignore[call-arg]
    assert attended[:, :3].isnan().all()
    torch.testing.assert_close(attended[:, 3:], torch.ones(2, 7, 8))


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_in_bfloat16_values_stay_close(how: Scores) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = SHAPES["a shared beginning"]
    states = [torch.randn(heads, 10, 16, generator=rng) for heads in (6, 2, 2)]
    attended = attend(*(part.bfloat16() for part in states), rows, how)  # type: ignore[call-arg]
    expected = _by_loops(*states, rows, how)  # type: ignore[call-arg]
    assert float((attended.float() - expected).norm() / expected.norm()) < 2e-2
