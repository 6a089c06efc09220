"""FLOP and bytes of operations, by their shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
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
