"""Rows of token ids as one stream without padding, in which a common beginning of rows appears once. Under causal
attention a token's state depends only on the tokens before it. So if two rows begin alike (the two answers of a
preference pair, n answers to one prompt, one system message), the common part is computed once, and the later row
attends to it there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ORIGINAL = "alignment_original"
"""Attribute of a copy: the tensor of the host, and the copy's version when it was made."""


def on_device(made: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host to ``device``. A GPU copies from pinned memory asynchronously. PyTorch holds the
    pinned memory until the copy is done. ``made`` must not change afterwards."""
    if device.type != "cuda" or made.is_cuda:
        return made.to(device)
    return _remembering(made.pin_memory().to(device, non_blocking=True), made)


def sent(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on ``device``; what is no tensor of the host stays as it is. Columns of one dtype are one copy."""
    columns = {name: value for name, value in batch.items() if isinstance(value, Tensor) and not value.is_cuda}
    if device.type != "cuda":
        return {**batch, **{name: column.to(device) for name, column in columns.items()}}
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}
    for name, column in columns.items():
        by_dtype.setdefault(column.dtype, {})[name] = column
    arrived: dict[str, Any] = dict(batch)
    for together in by_dtype.values():
        arrived |= _sent_together(together, device)
    return arrived


def _sent_together(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    joint = torch.cat([tensor.flatten() for tensor in tensors.values()]).pin_memory().to(device, non_blocking=True)
    parts = joint.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: _remembering(part.view(tensor.shape), tensor)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def on_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same numbers on the host; all that nobody remembers are read in one wait. What is read has the dtype of the
    first tensor that is."""
    known = [_original(tensor) for tensor in tensors]
    unknown = [tensor for tensor, original in zip(tensors, known, strict=True) if original is None]
    if not unknown:
        return tuple(original for original in known if original is not None)
    joint = torch.cat([tensor.flatten().to(unknown[0].dtype) for tensor in unknown]).cpu()
    parts = joint.split([tensor.numel() for tensor in unknown])
    fetched = iter([part.view(tensor.shape) for part, tensor in zip(parts, unknown, strict=True)])
    return tuple(next(fetched) if original is None else original for original in known)


def _remembering(copy: Tensor, original: Tensor) -> Tensor:
    setattr(copy, _ORIGINAL, (original, copy._version))
    return copy


def _original(tensor: Tensor) -> Tensor | None:
    """The tensor itself if it is on the host, or what it was copied from unless it was changed since."""
    if not tensor.is_cuda:
        return tensor
    original, version = getattr(tensor, _ORIGINAL, (None, None))
    return original if tensor._version == version else None


SHORTEST_SHARED = 16
"""Tokens below which a common beginning is computed twice, because attending elsewhere costs more than it saves."""
Range = tuple[int, int]
"""First index in the stream, and one past the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The tokens of a row that no earlier row has, at ``own`` in the stream, which follow those at ``before``.
    ``before`` is in the row's order, and empty if the row shares nothing. Negative indices are in another stream, which
    was read earlier and whose last token has index −1."""

    own: Range
    before: tuple[Range, ...]

    @property
    def keys(self) -> tuple[Range, ...]:
        """The ranges of the whole row in the stream."""
        return (*self.before, self.own)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRows:
    """A batch as one stream of ``[tokens]``. ``index`` is ``[rows, columns]``: the index in the stream of the token at
    a row and column (0 on padding). ``is_real`` is the mask of real tokens, of the same shape. ``lengths`` counts the
    rows' real tokens, including those that were read earlier. Example: rows ``[7 8 9 ·]`` and ``[5 6 · ·]`` give
    ``input_ids [7 8 9 5 6]``, ``position_ids [0 1 2 0 1]``, ``index [[0 1 2 0] [3 4 0 0]]``, ``lengths (3, 2)``."""

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    index: Tensor
    is_real: Tensor
    lengths: tuple[int, ...]

    @property
    def ends(self) -> Tensor:
        """``[rows]``: the index of each row's last token."""
        columns = torch.arange(1, self.is_real.shape[1] + 1, device=self.is_real.device)
        return self.index.gather(1, (self.is_real * columns).argmax(-1, keepdim=True)).squeeze(-1)

    def filled_up(self, multiple: int) -> FlatRows:
        """The rows with filler tokens at the end of the stream, up to a multiple; ``index`` does not contain them."""
        tokens = len(self.input_ids)
        filling = next_multiple(tokens, multiple) - tokens
        if not filling:
            return self
        return replace(
            self,
            input_ids=nn.functional.pad(self.input_ids, (0, filling)),
            position_ids=nn.functional.pad(self.position_ids, (0, filling)),
            segments=(*self.segments, Segment(own=(tokens, tokens + filling), before=())),
        )


def flatten(input_ids: Tensor, attention_mask: Tensor, *, share: bool = True) -> FlatRows:
    """Drops padding from ``[rows, columns]`` ids on either side; the mask decides, never the ids. Raises ValueError: a
    row has no real token, or has padding between two real tokens."""
    ids, mask = on_host(input_ids, attention_mask)
    is_real = mask.bool()
    lengths = is_real.sum(-1)
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the batch has no real token")
    changes = (is_real[:, 1:] != is_real[:, :-1]).sum(-1) + is_real[:, 0].int() + is_real[:, -1].int()
    if bool((changes != 2).any()):
        raise ValueError(f"row {int((changes != 2).int().argmax())} of the batch has padding between its tokens")
    rows = [row[real].tolist() for row, real in zip(ids, is_real, strict=True)]
    return _flat_rows(rows, is_real, input_ids.device, share=share)


def stream(rows: Sequence[Sequence[int]], device: torch.device, *, share: bool = True) -> FlatRows:
    """Unpadded rows of token ids as one stream. ``index`` has a column for each position. Raises ValueError: a row has
    no token."""
    lengths = torch.tensor([len(row) for row in rows])
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the batch has no real token")
    is_real = torch.arange(int(lengths.max())) < lengths[:, None]
    return _flat_rows(rows, is_real, device, share=share)


def behind(earlier: FlatRows, which: Sequence[int], texts: Sequence[Sequence[int]]) -> FlatRows:
    """A stream of non-empty texts; text i continues row ``which[i]`` of an earlier stream. ``index`` and ``is_real``
    have columns only for the tokens of the texts, not for those that were read earlier."""
    device, read = earlier.input_ids.device, len(earlier.input_ids)
    ends = [0, *itertools.accumulate(len(text) for text in texts)]
    before = {
        row: tuple((start - read, end - read) for start, end in earlier.segments[row].keys if start < end)
        for row in set(which)
    }
    lengths = torch.tensor([len(text) for text in texts])
    columns = torch.arange(int(lengths.max()))
    is_real = columns < lengths[:, None]
    positions = [torch.arange(len(text)) + earlier.lengths[row] for row, text in zip(which, texts, strict=True)]
    tensors = {
        "input_ids": torch.tensor([token for text in texts for token in text]),
        "position_ids": torch.cat(positions),
        "index": (torch.tensor(ends[:-1])[:, None] + columns) * is_real,
        "is_real": is_real,
    }
    return FlatRows(
        segments=tuple(
            Segment(own=(start, end), before=before[row])
            for row, (start, end) in zip(which, itertools.pairwise(ends), strict=True)
        ),
        lengths=tuple(earlier.lengths[row] + len(text) for row, text in zip(which, texts, strict=True)),
        **sent(tensors, device),
    )


def behind_one(tokens: int, rows: FlatRows) -> FlatRows:
    """The rows, where each continues an earlier stream that is one row of so many tokens."""
    return replace(
        rows,
        position_ids=rows.position_ids + tokens,
        segments=tuple(replace(segment, before=((-tokens, 0), *segment.before)) for segment in rows.segments),
        lengths=tuple(tokens + length for length in rows.lengths),
    )


def next_multiple(count: int, multiple: int) -> int:
    """The smallest multiple that is at least ``count``."""
    return -(-count // multiple) * multiple


def by_tokens(lengths: Sequence[int], limit: int, *, behind: Sequence[int] | None = None) -> list[range]:
    """Ranges of consecutive rows whose tokens add up to at most ``limit``; a longer row is a range of its own. The
    number of ranges is minimal, and the largest range is then as small as possible: a small remainder would take more
    than its share of time, and a full range more memory than necessary. ``behind`` holds each row's number of tokens if
    the row before is in the same range, where that differs. Examples: lengths ``[3, 3, 9, 1]`` with limit 6 give rows
    0-1, 2, 3; lengths ``[2, 2, 2, 2]`` with limit 6 give rows 0-1, 2-3."""
    return _most_even(lengths, len(_filled(lengths, limit, behind)), limit, behind)


def evenly(lengths: Sequence[int], count: int) -> list[range]:
    """At most ``count`` ranges of consecutive rows, the largest of them with as few tokens as possible. Example:
    lengths ``[3, 3, 9, 1]`` in two ranges are rows 0-1 and 2-3."""
    return _most_even(lengths, count, sum(lengths), None)


def _most_even(lengths: Sequence[int], count: int, limit: int, behind: Sequence[int] | None) -> list[range]:
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle, behind)) <= count else (middle + 1, high)
    return _filled(lengths, high, behind)


def _filled(lengths: Sequence[int], limit: int, behind: Sequence[int] | None) -> list[range]:
    ranges: list[range] = []
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        added = length if row == start or behind is None else behind[row]
        if row > start and tokens + added > limit:
            ranges.append(range(start, row))
            start, tokens, added = row, 0, length
        tokens += added
    return [*ranges, range(start, len(lengths))] if lengths else []


def _flat_rows(rows: Sequence[Sequence[int]], is_real: Tensor, device: torch.device, *, share: bool) -> FlatRows:
    common = _common_beginnings(rows) if share else [(0, 0)] * len(rows)
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for row, (earlier, count) in zip(rows, common, strict=True):
        start = len(ids)
        ids += row[count:]
        positions += range(count, len(row))
        before = _first(segments[earlier].keys, count) if count else ()
        segments.append(Segment(own=(start, len(ids)), before=before))
    index = torch.zeros(is_real.shape, dtype=torch.long)
    index[is_real] = torch.cat([torch.arange(*span) for segment in segments for span in segment.keys])
    tensors = {
        "input_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "index": index,
        "is_real": is_real,
    }
    return FlatRows(segments=tuple(segments), lengths=tuple(len(row) for row in rows), **sent(tensors, device))


def _first(ranges: Sequence[Range], count: int) -> tuple[Range, ...]:
    taken_ranges: list[Range] = []
    for start, end in ranges:
        if count == 0:
            break
        taken = min(count, end - start)
        taken_ranges.append((start, start + taken))
        count -= taken
    return tuple(taken_ranges)


def _common_beginnings(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    table = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    common = [(0, 0)]
    for number in range(1, len(rows)):
        same = (table[:number] == table[number]) & (table[number] >= 0)
        counts = np.where(same.all(-1), table.shape[1], same.argmin(-1))
        earlier = int(counts.argmax())
        count = int(counts[earlier])
        common.append((earlier, count) if count >= SHORTEST_SHARED else (0, 0))
    return common
