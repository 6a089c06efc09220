"""Rows of token ids as one stream in which padding is dropped and a common beginning of rows stands once.

Under causal attention what a token's state is depends on the tokens before it alone. So where two rows begin alike (the
two answers of a preference pair, n answers to one prompt, one system message) the common part is computed once, and
the later row attends to it where it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from alignment.models.forward.transfer import on_device

SHORTEST_SHARED = 16
"""Tokens below which a common beginning is computed twice: attending elsewhere costs more than it saves."""

Range = tuple[int, int]
"""First place and one past the last, in the stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The tokens of a row that no earlier row has, at ``own`` in the stream, behind those at ``before``.

    ``before`` is in the row's order; it is empty where the row shares nothing. Places below 0 are in another stream,
    which was read earlier: its last token stands at −1.
    """

    own: Range
    before: tuple[Range, ...]

    @property
    def keys(self) -> tuple[Range, ...]:
        """Where the whole row stands in the stream."""
        return (*self.before, self.own)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRows:
    """A batch as one stream of ``[tokens]``.

    ``place`` is ``[rows, columns]``: where the token of a row and column stands in the stream (0 on padding), ``kept``
    the same shape's mask of real tokens, ``lengths`` the rows' real tokens, with those that were read earlier.
    Example: rows ``[7 8 9 ·]`` and ``[5 6 · ·]`` give ``input_ids [7 8 9 5 6]``, ``position_ids [0 1 2 0 1]``,
    ``place [[0 1 2 0] [3 4 0 0]]``, ``lengths (3, 2)``.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    place: Tensor
    kept: Tensor
    lengths: tuple[int, ...]

    @property
    def ends(self) -> Tensor:
        """``[rows]`` place of each row's last token."""
        columns = torch.arange(1, self.kept.shape[1] + 1, device=self.kept.device)
        return self.place.gather(1, (self.kept * columns).argmax(-1, keepdim=True)).squeeze(-1)

    def filled_up(self, multiple: int) -> FlatRows:
        """With a row of filling at the end of the stream, of which no place tells, if its tokens are no multiple."""
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
    """Drops padding from ``[rows, columns]`` ids, wherever it stands, by the mask and never by the ids.

    Raises:
        ValueError: a row has no real token, or padding between two real tokens.
    """
    ids, mask = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).cpu()  # one wait for a GPU
    kept = mask.bool()
    lengths = kept.sum(-1)
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the batch has no real token")
    changes = (kept[:, 1:] != kept[:, :-1]).sum(-1) + kept[:, 0].int() + kept[:, -1].int()
    if bool((changes != 2).any()):
        raise ValueError(f"row {int((changes != 2).int().argmax())} of the batch has padding between its tokens")
    rows = [row[real].tolist() for row, real in zip(ids, kept, strict=True)]
    return _laid_out(rows, kept, input_ids.device, share=share)


def stream(rows: Sequence[Sequence[int]], device: torch.device, *, share: bool = True) -> FlatRows:
    """Rows of token ids as one stream; there never was any padding. ``place`` has a column for each position.

    Raises:
        ValueError: a row has no token.
    """
    lengths = torch.tensor([len(row) for row in rows])
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the batch has no real token")
    kept = torch.arange(int(lengths.max())) < lengths[:, None]
    return _laid_out(rows, kept, device, share=share)


def behind(earlier: FlatRows, which: Sequence[int], texts: Sequence[Sequence[int]]) -> FlatRows:
    """A stream of texts alone, none of them empty; text i goes on where row ``which[i]`` of an earlier stream ends.

    ``place`` and ``kept`` have a column for each token of a text, and none for those that were read earlier.
    """
    device, read = earlier.input_ids.device, len(earlier.input_ids)
    ends = [0, *itertools.accumulate(len(text) for text in texts)]
    before = {row: tuple((start - read, end - read) for start, end in _stands(earlier, row)) for row in set(which)}
    lengths = torch.tensor([len(text) for text in texts])
    columns = torch.arange(int(lengths.max()))
    kept = columns < lengths[:, None]
    return FlatRows(
        input_ids=on_device(torch.tensor([token for text in texts for token in text]), device),
        position_ids=on_device(
            torch.cat([torch.arange(len(text)) + earlier.lengths[row] for row, text in zip(which, texts, strict=True)]),
            device,
        ),
        segments=tuple(
            Segment(own=(start, end), before=before[row])
            for row, (start, end) in zip(which, itertools.pairwise(ends), strict=True)
        ),
        place=on_device((torch.tensor(ends[:-1])[:, None] + columns) * kept, device),
        kept=on_device(kept, device),
        lengths=tuple(earlier.lengths[row] + len(text) for row, text in zip(which, texts, strict=True)),
    )


def _stands(rows: FlatRows, row: int) -> tuple[Range, ...]:
    """Where a row's tokens stand, in its order."""
    return tuple((start, end) for start, end in rows.segments[row].keys if start < end)


def next_multiple(count: int, multiple: int) -> int:
    """The smallest multiple that is no less than ``count``."""
    return -(-count // multiple) * multiple


def by_tokens(lengths: Sequence[int], limit: int, *, behind: Sequence[int] | None = None) -> list[range]:
    """Consecutive rows whose tokens add up to at most ``limit``; a longer row stands alone.

    There are as few pieces as can be, and of these the largest is as small as can be: a small rest would cost more than
    its share of time, and a full piece more memory than it must. ``behind`` are the rows' tokens where the row before
    is in the same piece, if that makes a difference. Examples: lengths ``[3, 3, 9, 1]`` with limit 6 give rows 0-1, 2,
    3; lengths ``[2, 2, 2, 2]`` with limit 6 give rows 0-1, 2-3.
    """
    fewest = len(_filled(lengths, limit, behind))
    low, high = 0, limit
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle, behind)) == fewest else (middle + 1, high)
    return _filled(lengths, high, behind)


def _filled(lengths: Sequence[int], limit: int, behind: Sequence[int] | None) -> list[range]:
    """Each piece takes rows until the next one would be too much."""
    found: list[range] = []
    start, tokens = 0, 0
    for row, length in enumerate(lengths):
        added = length if row == start or behind is None else behind[row]
        if row > start and tokens + added > limit:
            found.append(range(start, row))
            start, tokens, added = row, 0, length
        tokens += added
    return [*found, range(start, len(lengths))] if lengths else []


def _laid_out(rows: Sequence[Sequence[int]], kept: Tensor, device: torch.device, *, share: bool) -> FlatRows:
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
    place = torch.zeros(kept.shape, dtype=torch.long)
    place[kept] = torch.cat([torch.arange(*part) for segment in segments for part in segment.keys])
    return FlatRows(
        input_ids=on_device(torch.tensor(ids), device),
        position_ids=on_device(torch.tensor(positions), device),
        segments=tuple(segments),
        place=on_device(place, device),
        kept=on_device(kept, device),
        lengths=tuple(len(row) for row in rows),
    )


def _first(ranges: Sequence[Range], count: int) -> tuple[Range, ...]:
    """The first ``count`` places of ``ranges``."""
    found: list[Range] = []
    for start, end in ranges:
        if count == 0:
            break
        taken = min(count, end - start)
        found.append((start, start + taken))
        count -= taken
    return tuple(found)


def _common_beginnings(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """For each row the earlier row with which it has most of its beginning in common, and how many tokens that is."""
    table = np.full((len(rows), max(len(row) for row in rows)), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        table[number, : len(row)] = row
    found = [(0, 0)]
    for number in range(1, len(rows)):
        same = (table[:number] == table[number]) & (table[number] >= 0)
        counts = np.where(same.all(-1), table.shape[1], same.argmin(-1))
        earlier = int(counts.argmax())
        count = int(counts[earlier])
        found.append((earlier, count) if count >= SHORTEST_SHARED else (0, 0))
    return found
