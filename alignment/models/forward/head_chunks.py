"""Memory for the products of hidden states with a head, so that only the logits of a chunk of tokens exist at once.

The products have the weights' dtype; float32 rows of them are handled some at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from alignment.models.forward.flat import MULTIPLE
from alignment.models.forward.rows import next_multiple

CHUNK = 256
"""Tokens projected at once: 256 × 49,152 bfloat16 products are 25 MB."""

IN_CACHE = 2**19
"""Float32 numbers that a pass over logits handles at once on a CPU; 2 MB fit into a core's cache."""


class ChunkMemory:
    """Memory for one chunk's products, and for the float32 rows of them that are handled at once.

    It is reused for the next chunk, because new pages for 100 MB cost as much as the arithmetic on them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        count, vocabulary = _whole(min(CHUNK, hidden.shape[0])), weight.shape[0]
        self.at_once = count if hidden.device.type != "cpu" else min(count, max(1, IN_CACHE // vocabulary))
        self._states = hidden.new_zeros(count, hidden.shape[1])
        self._products = torch.empty(count, vocabulary, dtype=hidden.dtype, device=hidden.device)
        self.logits = torch.empty(self.at_once, vocabulary, dtype=torch.float32, device=hidden.device)
        self.shares = torch.empty_like(self.logits)

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """``[chunk, vocabulary]`` products of a chunk's states with the head."""
        self._states[: len(hidden)] = hidden
        whole = _whole(len(hidden))
        torch.mm(self._states[:whole], weight.T, out=self._products[:whole])
        return self._products[: len(hidden)]

    def project_back(self, count: int, weight: Tensor) -> Tensor:
        """``[count, width]`` products of the head with the values that replaced a chunk's products."""
        return torch.mm(self._products[: _whole(count)], weight)[:count]

    def parts(self, chunk: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows of a chunk that are handled at once, as a slice of all rows, and a view of their products."""
        for rows in _slices(chunk.start, chunk.stop, self.at_once):
            yield rows, self._products[rows.start - chunk.start : rows.stop - chunk.start]


def _whole(count: int) -> int:
    """A number of rows for which a product of this shape was probably computed before, which costs less."""
    return next_multiple(count, MULTIPLE)


def chunks_of(stop: int, *, start: int = 0) -> Iterator[slice]:
    """Yields the tokens from ``start`` to one before ``stop`` that are projected at once."""
    return _slices(start, stop, CHUNK)


def length(rows: slice) -> int:
    """Number of rows of a slice."""
    return int(rows.stop - rows.start)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))
