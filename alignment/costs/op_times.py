"""How long operations take on this machine: each is run with real tensors of the same shapes, and timed.

A stage reads what many operations before have written, and the next layer's weights. So other memory is written before
each timed run. With inputs that are still in the processor's nearest caches, the operations of a step took two thirds
of what they take in a stage. Where little is read and written from one run of an operation to the next, as in
sampling, its code is still in these caches: it runs on other tensors first (docs/LOG.md, 2026-11-28).
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
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
"""Other memory that is written before a run; more than a core's own caches hold."""
NEAR_BYTES = 4 << 20
"""What the second-level caches of two cores hold: code that ran so few bytes ago is still there."""
_NUMBER = torch.zeros(1)
NEARLY = 1.1
"""Sizes that differ by less than about this factor count as the same; the time is then one of their bytes."""
MOST_AXES = 8
"""Whole numbers below this may be axes, on which the time of an operation depends."""
MOST_BYTES = 4 << 30
"""Tensors of one operation that are made; larger ones are not timed."""


@torch.no_grad()
def seconds_of(operation: Operation, *, bytes_between: float) -> float | None:
    """Seconds of one run after a first one; None if it cannot be run here.

    ``bytes_between`` is what a stage reads and writes from one run of this function to the next.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in _tensors(operation)) > MOST_BYTES:
        return None
    try:
        args, kwargs = tree_map(_real, (operation.args, operation.kwargs))
        others = tree_map(_real, (operation.args, operation.kwargs)) if bytes_between < NEAR_BYTES else None
        swept = torch.empty(SWEPT_BYTES, dtype=torch.uint8)
        times: list[float] = []
        while len(times) <= RUNS and sum(times) < ENOUGH_SECONDS:
            if times:  # the first run does not count
                swept.fill_(len(times))
            if others is not None:
                operation.func(*others[0], **others[1])
            _NUMBER.view(1)  # brings the code that calls operations back into the caches, where it is in a stage
            began = time.perf_counter()
            operation.func(*args, **kwargs)
            times.append(time.perf_counter() - began)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    return min(times[1:], default=times[0])


def alike(operation: Operation) -> Hashable:
    """What operations have in common that take the same time for each byte: function, types and nearly the sizes.

    A view takes the same time whatever its size.
    """
    if getattr(operation.func, "is_view", False):
        return str(operation.func)
    leaves = tree_leaves((operation.args, operation.kwargs))
    return (operation.func, *map(_form, leaves))


def _form(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        sizes = tuple(round(math.log(size, NEARLY)) if size > 1 else size - 1 for size in leaf.shape)
        return (leaf.dtype, sizes, leaf.is_contiguous(), leaf.stride()[-1:] == (1,))
    return leaf if isinstance(leaf, (bool, torch.dtype)) or (isinstance(leaf, int) and abs(leaf) < MOST_AXES) else None


def _tensors(operation: Operation) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((operation.args, operation.kwargs)) if isinstance(leaf, Tensor)]


def _real(leaf: Any) -> Any:
    """A real tensor in the place of one on the meta device. Integers are 0, which is a valid index everywhere."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, Tensor):
        return leaf
    made = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype)
    return made.fill_(0.5) if leaf.is_floating_point() else made.zero_()
