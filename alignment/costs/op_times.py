"""How long operations take on this machine: each is run with real tensors of the same shapes, and timed. A stage reads
what many operations before have written, and the next layer's weights. So other memory is written before a timed run;
several operations, each on tensors of its own, share that. With inputs that are still in the processor's nearest
caches, the operations of a step took two thirds of what they take in a stage. Where little is read and written from one
run of an operation to the next, as in sampling, its code is still in these caches: it runs on other tensors first
(docs/LOG.md, 2026-11-28)."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from alignment.costs.shadows import Operation

aten = torch.ops.aten

_VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "detach", "alias", "split",
    "split_with_sizes", "unsqueeze", "squeeze", "as_strided", "unbind", "diagonal", "unfold", "_reshape_alias",
    "empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided", "lift_fresh", "is_pinned",
}  # fmt: skip
"""Operations that move no numbers."""
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise"}


def is_compiled(operation: Operation) -> bool:
    """Whether it is a product for which oneDNN makes code on a CPU: one of 16-bit numbers."""
    result = operation.results[0] if operation.results else None
    return operation.func.overloadpacket.__name__ in _PRODUCTS and result is not None and result.itemsize == 2


def flop_of(operation: Operation) -> float:
    """Floating-point operations of products, each multiplication and addition counted."""
    name = operation.func.overloadpacket.__name__
    count = flop_registry.get(getattr(aten, name.removesuffix("_"), None))
    if count is not None:
        return float(count(*operation.args, **operation.kwargs, out_val=operation.results[0]))
    if operation.func is torch.ops.mkldnn._linear_pointwise.default:
        x, weight = operation.args[:2]
        return float(2 * x.numel() * len(weight))
    return 0.0


def bytes_of(operation: Operation) -> float:
    """Bytes read and written, each tensor once."""
    if operation.func.overloadpacket.__name__ in _VIEWS:
        return 0.0
    leaves = tree_leaves((operation.args, operation.kwargs, operation.results))
    return float(sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor)))


RUNS = 2
"""Timed runs of an operation; the fastest counts."""
ENOUGH_SECONDS = 0.05
"""After so long an operation is not run again."""
SWEPT_BYTES = 64 << 20
"""Other memory that is written before operations run again; more than a core's own caches hold."""
TOGETHER_BYTES = 256 << 20
"""Tensors of the operations that run one after another behind one such write."""
NEAR_BYTES = 4 << 20
"""What the second-level caches of two cores hold: code that ran so few bytes ago is still there."""
_NUMBER = torch.zeros(1)
NEARLY = 1.1
"""Sizes that differ by less than about this factor count as the same; the time is then one of their bytes."""
MOST_AXES = 8
"""Whole numbers below this may be axes, on which the time of an operation depends."""
MOST_BYTES = 4 << 30
"""Tensors of one operation that are made; larger ones are not timed."""


class _Trial:
    """An operation on real tensors of its own, and the seconds of its runs, of which the first does not count."""

    def __init__(self, operation: Operation, *, bytes_between: float) -> None:
        self._func = operation.func
        self._args, self._kwargs = tree_map(_real, (operation.args, operation.kwargs))
        is_near = bytes_between < NEAR_BYTES
        self._others = tree_map(_real, (operation.args, operation.kwargs)) if is_near else None
        self._times: list[float] = []

    def run(self) -> None:
        if sum(self._times) >= ENOUGH_SECONDS:
            return
        if self._others is not None:
            self._func(*self._others[0], **self._others[1])
        _NUMBER.view(1)  # brings the code that calls operations back into the caches, where it is in a stage
        began = time.perf_counter()
        self._func(*self._args, **self._kwargs)
        self._times.append(time.perf_counter() - began)

    def seconds(self) -> float:
        return min(self._times[1:], default=self._times[0])


@torch.no_grad()
def seconds_of(operations: Sequence[tuple[Operation, float]]) -> list[float]:
    """Seconds of one run of each operation after a first one; 0 if it cannot be run here. With each operation comes
    what a stage reads and writes from one run of its function to the next, in bytes."""
    seconds: list[float] = []
    swept = torch.empty(SWEPT_BYTES, dtype=torch.uint8)
    for group in _groups(operations):
        trials = [_first_run(operation, bytes_between) for operation, bytes_between in group]
        for number in range(RUNS):
            swept.fill_(number)
            for trial in filter(None, trials):
                trial.run()
        seconds += [0.0 if trial is None else trial.seconds() for trial in trials]
    return seconds


def _groups(operations: Sequence[tuple[Operation, float]]) -> Iterator[list[tuple[Operation, float]]]:
    group: list[tuple[Operation, float]] = []
    size = 0
    for operation, bytes_between in operations:
        own = _size_of(operation)
        if group and size + own > TOGETHER_BYTES:
            yield group
            group, size = [], 0
        group.append((operation, bytes_between))
        size += own
    if group:
        yield group


def _first_run(operation: Operation, bytes_between: float) -> _Trial | None:
    if _size_of(operation) > MOST_BYTES:
        return None
    try:
        trial = _Trial(operation, bytes_between=bytes_between)
        trial.run()
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    return trial


def alike(operation: Operation) -> Hashable:
    """What operations have in common that take the same time for each byte: function, types and nearly the sizes. A
    view takes the same time whatever its size."""
    if getattr(operation.func, "is_view", False):
        return str(operation.func)
    leaves = tree_leaves((operation.args, operation.kwargs))
    return (operation.func, *map(_form, leaves))


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        sizes = tuple(round(math.log(size, NEARLY)) if size > 1 else size - 1 for size in leaf.shape)
        return (leaf.dtype, sizes, leaf.is_contiguous(), leaf.stride()[-1:] == (1,))
    return leaf if isinstance(leaf, (bool, torch.dtype)) or (isinstance(leaf, int) and abs(leaf) < MOST_AXES) else None


def _size_of(operation: Operation) -> int:
    leaves = tree_leaves((operation.args, operation.kwargs))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _real(leaf: Any) -> Any:
    """A real tensor in the place of one on the meta device. Integers are 0, which is a valid index everywhere."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype)
    return made.fill_(0.5) if leaf.is_floating_point() else made.zero_()
