"""Shadows: tensors with a shape and no numbers, on which a stage runs in seconds and in little memory. Large tensors of
numbers become shadows. Their operations run on PyTorch's meta device, which computes shapes, types and which tensors
share memory. Token ids, masks and small tensors stay real, so that rows have the lengths of the data. Where a program
reads a number from a shadow, that number is 1, and truth values and token ids that it derives from shadows are computed
as if every number were 1. So sampling, sorting and checks for infinite values go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

SMALL = 1024
"""Count of numbers below which a tensor stays real."""
MOST_ZEROS = 1 << 22
"""Count of numbers that a shadow may have to be written to a file."""
REAL = {torch.int64, torch.bool}
"""Types of token ids, indices and masks, which stay real."""

_FACTORIES = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.rand.default,
    aten.rand.generator,
    aten.randn.default,
    aten.randn.generator,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Operations that make a tensor out of nothing, on a device that they are told."""
_EMPTY = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_READ = {aten.nonzero.default, aten.equal.default}
"""Operations that read numbers, which the meta device lacks."""
_WITHOUT_GENERATOR = {aten.rand.generator: aten.rand.default, aten.randn.generator: aten.randn.default}
_RULES: dict[Any, Callable[..., Any]] = {
    torch.ops.mkldnn._reorder_linear_weight.default: lambda weight, rows: torch.empty_like(weight),
    torch.ops.mkldnn._linear_pointwise.default: lambda x, weight, bias, *_: x.new_empty(*x.shape[:-1], len(weight)),
}
"""What operations return that the meta device lacks."""
_ONLY_FOR_NUMBERS = {"generator", "pin_memory", "non_blocking"}
"""Arguments that the meta device does not take."""

Key = tuple[Any, ...]
"""An operation, with the types, shapes and strides of its tensors and its other arguments."""


class Operation(NamedTuple):
    """An operation with its arguments and results; tensors are on the meta device, in memory of their own."""

    func: Any
    args: Any
    kwargs: Any
    results: tuple[Tensor, ...]


Observer = Callable[[Key, Sequence[Tensor], Callable[[], Operation] | None], None]
"""Called after each operation on shadows: with its key, the tensors of its result on the meta device, and a function
that returns the operation itself. If the key was seen before, the function may be None, and then only the tensors in
new memory are given."""

real_tensors = _disable_current_modes
"""A context in which new tensors are real, whatever their size."""


class Shadow(torch.Tensor):
    """A tensor whose shape, strides and storage are those of ``meta``; it claims to be on ``device``."""

    meta: Tensor
    form: Any
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> Shadow:
        """Wraps a tensor on the meta device."""
        shadow: Shadow = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        shadow.meta = meta
        shadow.form = _form(meta)
        return shadow

    @property
    def data(self) -> Tensor:
        """The tensor without its history."""
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, new: Tensor) -> None:
        """Takes over the memory of another shadow, too, which the assignment alone would leave out."""
        torch.Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.meta = new.meta if isinstance(new, Shadow) else shape_of(new)
        self.form = _form(self.meta)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shadow({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Ones."""
        return self.numpy().tolist()

    def numpy(self, *, force: bool = False) -> NDArray[Any]:
        """Ones."""
        return np.ones(tuple(self.shape), dtype=np.float64 if self.dtype is torch.float64 else np.float32)

    def data_ptr(self) -> int:
        """Like an address, it is the same for tensors that share memory."""
        return int(self.meta.untyped_storage()._cdata)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            copied: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} was called on a shadow outside of ShadowMode")


class _Part(NamedTuple):
    """A tensor of a result: the argument with the index ``source``, a view of its memory from ``offset`` on behind its
    own with this ``shape``, or without a source one in new memory."""

    source: int | None
    shape: Tensor | None
    offset: int = 0


class _Outcome(NamedTuple):
    """The parts of the result of an operation on arguments of certain shapes, and whether they are a list."""

    parts: tuple[_Part, ...]
    is_list: bool


class ShadowMode(TorchDispatchMode):
    """While active, large tensors of numbers are shadows; ``observer`` sees their operations."""

    def __init__(self, observer: Observer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._observer = observer
        self._outcomes: dict[Key, _Outcome] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would wrap each call in a function that guards against compiling it, which costs time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on shapes if shadows are among its tensors or its result would be one."""
        kwargs = kwargs or {}
        leaves = _leaves(args, kwargs)
        shadow = next((leaf for leaf in leaves if type(leaf) is Shadow or isinstance(leaf, Shadow)), None)
        if shadow is None:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            return self._of_real_tensors(func, args, kwargs, tensors)
        key = (func, *map(_described, leaves), *kwargs)
        if (outcome := self._outcomes.get(key)) is not None:
            return self._again(key, outcome, leaves, torch.device(kwargs.get("device") or shadow.device))
        if func is aten._local_scalar_dense.default:
            return 1.0 if shadow.dtype.is_floating_point else 1
        if func is aten.is_pinned.default:
            return False
        return self._of_shadows(func, args, kwargs, shadow.device)

    def _of_real_tensors(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        device = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        if func in _FACTORIES and device.type != "meta":
            images: dict[int, Tensor] = {}
            on_meta = _on_meta_device(args, kwargs, images)
            made = _call(func, *on_meta)
            if _is_shadowed(made):
                return self._shadows(_key_of(func, args, kwargs), func, on_meta, made, images, device)
        result = func(*args, **kwargs)
        if func in _EMPTY and result.is_floating_point():
            return result.fill_(1)  # it may never be written to, and what is left in memory might not be finite
        given = {id(tensor) for tensor in tensors}
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in given]
        if not any(map(_is_shadowed, leaves)):
            return result
        shapes = tree_map(lambda leaf: shape_of(leaf) if _is_new(leaf, given) else leaf, result)
        on_meta = _on_meta_device(args, kwargs, {})
        return self._shadows(_key_of(func, args, kwargs), func, on_meta, shapes, {}, device)

    def _of_shadows(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        if func in _READ:
            return _on_ones(func, args, kwargs)
        if func in _INDEXED:
            args = (args[0], _as_indices(args[1]), *args[2:])
        elif func is aten.masked_select.default:
            func, args = aten.index.Tensor, (args[0], _as_indices([args[1]]))
        device = torch.device(kwargs.get("device") or device)
        key = _key_of(func, args, kwargs)
        images: dict[int, Tensor] = {}
        on_meta = _on_meta_device(args, kwargs, images)
        result = _call(func, *on_meta)
        new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in images]
        if new and all(leaf.dtype in REAL for leaf in new):
            return _on_ones(func, args, kwargs)
        outcome = _outcome(result, _leaves(args, kwargs), images)
        shadows = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Shadow)]
        if outcome is not None and all(leaf.form == _form(leaf.meta) for leaf in shadows):  # which it left as they were
            self._outcomes[key] = outcome
        return self._shadows(key, func, on_meta, result, images, device)

    def _again(self, key: Key, outcome: _Outcome, leaves: Sequence[Any], device: torch.device) -> Any:
        metas, made = [], []
        for source, shape, offset in outcome.parts:
            if shape is None:
                assert source is not None, "without a shape it is an argument"
                made.append(leaves[source])
                continue
            if source is None:
                meta = shape_of(shape)
                metas.append(meta)
                if shape.dtype in REAL:
                    made.append(torch.zeros(shape.size(), dtype=shape.dtype))
                    continue
            else:
                whole = leaves[source].meta
                meta = whole.as_strided(shape.size(), shape.stride(), whole.storage_offset() + offset)
            made.append(Shadow(meta, device))
        if self._observer is not None:
            self._observer(key, metas, None)
        return made if outcome.is_list else made[0]

    def _shadows(
        self, key: Key, func: Any, on_meta: Any, result: Any, images: dict[int, Tensor], device: torch.device
    ) -> Any:
        """A result on the meta device as shadows; what is an image of an argument is that argument again."""
        if self._observer is not None:
            metas = [leaf for leaf in _leaves((result,), {}) if isinstance(leaf, Tensor) and leaf.is_meta]

            def operation() -> Operation:
                args, kwargs = tree_map(shape_of, on_meta)
                return Operation(func, args, kwargs, tuple(map(shape_of, metas)))

            self._observer(key, metas, operation)

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_meta:
                return leaf
            if id(leaf) in images:
                return images[id(leaf)]
            return torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.dtype in REAL else Shadow(leaf, device)

        return _mapped(of, result)


def shape_of(leaf: Any) -> Any:
    """A tensor's image on the meta device, in memory of its own; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")


def _is_shadowed(tensor: Tensor) -> bool:
    return tensor.dtype not in REAL and tensor.numel() >= SMALL and not isinstance(tensor, Shadow)


def _is_new(leaf: Any, given: set[int]) -> bool:
    return isinstance(leaf, Tensor) and id(leaf) not in given and _is_shadowed(leaf)


def _leaves(args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    leaves: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, (list, tuple)):
            leaves += value
        else:
            leaves.append(value)
    return leaves


def _outcome(result: Any, leaves: Sequence[Any], images: Mapping[int, Tensor]) -> _Outcome | None:
    """How to make a result on the meta device again from the leaves of arguments; None if that is not known."""
    is_list = isinstance(result, (list, tuple))
    parts, new = [], set()
    for leaf in result if is_list else [result]:
        if not isinstance(leaf, Tensor):
            return None
        if (argument := images.get(id(leaf))) is not None:
            parts.append(_Part(next(index for index, own in enumerate(leaves) if own is argument), None))
            continue
        memory = leaf.untyped_storage()._cdata
        shadows = ((index, own.meta) for index, own in enumerate(leaves) if isinstance(own, Shadow))
        source, whole = next((pair for pair in shadows if pair[1].untyped_storage()._cdata == memory), (None, leaf))
        if memory in new or whole.dtype is not leaf.dtype:
            return None
        if source is None:
            new.add(memory)
        offset = 0 if source is None else int(leaf.storage_offset()) - int(whole.storage_offset())
        parts.append(_Part(source, shape_of(leaf), offset))
    return _Outcome(tuple(parts), is_list) if parts else None


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    return type(value)(map(function, value)) if type(value) in (list, tuple) else function(value)


def _key_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Key:
    return (func, *map(_described, _leaves(args, kwargs)), *kwargs)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.form if isinstance(leaf, Shadow) else _form(leaf)
    if isinstance(leaf, (int, float)):
        return (type(leaf), leaf)  # 2 and 2.0 are equal, but not what a product with an integer is
    return leaf if isinstance(leaf, (str, torch.dtype, type(None))) else str(leaf)


def _on_meta_device(args: Any, kwargs: Any, images: dict[int, Tensor]) -> tuple[Any, dict[str, Any]]:
    """The arguments with all tensors on the meta device; ``images`` receives each tensor by the id of its image."""

    def image(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("meta")
        if not isinstance(leaf, Tensor):
            return None if isinstance(leaf, torch.Generator) else leaf
        meta = leaf.meta if isinstance(leaf, Shadow) else shape_of(leaf)
        images[id(meta)] = leaf
        return meta

    named = {name: _mapped(image, value) for name, value in kwargs.items() if name not in _ONLY_FOR_NUMBERS}
    return tuple(_mapped(image, value) for value in args), named


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in _RULES:
        return _RULES[func](*args, **kwargs)
    func = _WITHOUT_GENERATOR.get(func, func)
    return func(*args, **({**kwargs, "device": "meta"} if func in _FACTORIES else kwargs))


def _as_indices(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    every: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            every.extend(index.nonzero().unbind(1))
        else:
            every.append(index)
    return every


def _on_ones(func: Any, args: Any, kwargs: Any) -> Any:

    def as_ones(leaf: Any) -> Any:
        return torch.ones((), dtype=leaf.dtype).expand(leaf.shape) if isinstance(leaf, Shadow) else leaf

    return func(*tree_map(as_ones, tuple(args)), **tree_map(as_ones, kwargs))


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the place of shadows, to write to a file; those of more than ``MOST_ZEROS`` numbers are left out."""
    with real_tensors():
        return {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, Shadow) else tensor
            for name, tensor in tensors.items()
            if tensor.numel() <= MOST_ZEROS
        }
