"""Operations are timed as they are in a stage, where other memory was used since their inputs were written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignment.costs.op_times import MOST_BYTES, NEAR_BYTES, RUNS, alike, seconds_of
from alignment.costs.shadows import Operation

CACHES_OF_A_CORE = 8 << 20
"""Bytes; the second-level caches of the processors that are sold for servers have up to 2 MB, laptops' up to 4."""


class Written(TorchDispatchMode):
    """Notes, in order, the runs of ``torch.mm`` and the bytes that other operations write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[int | str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.events.append("mm")
        elif func is torch.ops.aten.fill_.Scalar:
            self.events.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


def operation(func: Any, *shapes: tuple[int, ...]) -> Operation:
    args = tuple(torch.empty(shape, device="meta") for shape in shapes)
    return Operation(func=func, args=args, kwargs={}, results=())


def test_more_than_the_caches_hold_is_written_before_each_timed_run() -> None:
    with Written() as written:
        seconds_of(operation(torch.ops.aten.mm.default, (4, 4), (4, 4)), bytes_between=NEAR_BYTES)
    before_a_run = [before for before, event in zip(written.events, written.events[1:], strict=False) if event == "mm"]
    _, *before_a_timed_run = before_a_run
    assert len(before_a_timed_run) == RUNS
    assert all(isinstance(size, int) and size > CACHES_OF_A_CORE for size in before_a_timed_run)


@pytest.mark.parametrize(
    ("func", "shape", "other", "counts_as_alike"),
    [
        (torch.ops.aten.mm.default, (400, 64), (401, 64), True),
        (torch.ops.aten.mm.default, (400, 64), (800, 64), False),
        (torch.ops.aten.mm.default, (1, 64), (2, 64), False),
        (torch.ops.aten.view.default, (400, 64), (8, 16), True),
    ],
)
def test_nearly_equal_products_and_all_views_are_timed_once(
    func: Any, shape: tuple[int, ...], other: tuple[int, ...], *, counts_as_alike: bool
) -> None:
    forms = [alike(operation(func, each, (64, 64))) for each in (shape, other)]
    assert (forms[0] == forms[1]) == counts_as_alike


def test_an_operation_that_cannot_run_has_no_time() -> None:
    assert seconds_of(operation(torch.ops.aten.mm.default, (4, 5), (4, 5)), bytes_between=NEAR_BYTES) is None


def test_an_operation_on_more_memory_than_a_plan_may_take_is_not_run() -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it was run")

    assert seconds_of(operation(run, (MOST_BYTES // 4 + 1,)), bytes_between=NEAR_BYTES) is None
