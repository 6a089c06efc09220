"""Divides the rows of a stream into two streams of about equal work, which are computed side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.models.forward.rows import FlatRows, Segment, stream
from alignment.models.forward.two_threads import LARGEST, balanced

TOKEN = 768
"""What a token costs apart from attention, as the length of a row in which its attention takes as long: SmolLM2-135M
with LoRA on two Intel cores (docs/LOG.md, 2026-11-29)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedRows:
    """Two streams with all rows of one. ``source [tokens]`` is, for each token of the whole stream, its index in the
    two parts one after the other. Tokens that both parts have are used from one of them."""

    parts: tuple[FlatRows, FlatRows]
    source: Tensor


def divided(rows: FlatRows) -> DividedRows | None:
    """The rows in two streams; None if one of these would be too large, as with a single row.

    Rows with a beginning in common stay together if possible. Else the shortest common beginnings, such as a system
    turn, are computed in both parts.

    Args:
        rows: on the CPU, and not behind an earlier stream.
    """
    limit = LARGEST * sum(_costs(rows))
    shared = [sum(end - start for start, end in segment.before) for segment in rows.segments]
    for longest_twice in (0, *sorted(set(shared) - {0})):
        first, second = _assigned(rows, shared, longest_twice)
        if not second:
            continue
        parts = _stream_of(rows, first), _stream_of(rows, second)
        if all(sum(_costs(part)) <= limit for part in parts):
            return DividedRows(parts=parts, source=_source(rows, (first, second), parts))
    return None


def _costs(rows: FlatRows) -> list[int]:
    lengths = zip(rows.segments, rows.lengths, strict=True)
    return [(segment.own[1] - segment.own[0]) * (TOKEN + length) for segment, length in lengths]


def _assigned(rows: FlatRows, shared: list[int], longest_twice: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows in each part if common beginnings of up to ``longest_twice`` tokens are computed in both."""
    twice = [tokens <= longest_twice for tokens in shared]
    costs = [
        cost + (tokens * (TOKEN + length) if again else 0)
        for cost, tokens, length, again in zip(_costs(rows), shared, rows.lengths, twice, strict=True)
    ]
    families = _families(rows.segments, twice)
    shares = balanced([sum(costs[row] for row in family) for family in families])
    first, second = (sorted(row for index in share for row in families[index]) for share in shares)
    return first, second


def _families(segments: tuple[Segment, ...], twice: list[bool]) -> list[list[int]]:
    """Numbers of rows that must stay together, because they read tokens of one another, directly or not."""
    family_of = list(range(len(segments)))
    for row, segment in enumerate(segments):
        if twice[row]:
            continue
        read = {family_of[other] for other in range(row) if _overlaps(segment, segments[other])}
        family_of = [row if family in read else family for family in family_of]
    return [[row for row, of_row in enumerate(family_of) if of_row == family] for family in dict.fromkeys(family_of)]


def _overlaps(segment: Segment, other: Segment) -> bool:
    """Whether the first reads tokens of the other."""
    return any(start < other.own[1] and other.own[0] < end for start, end in segment.before)


def _stream_of(rows: FlatRows, which: list[int]) -> FlatRows:
    tokens = [rows.input_ids[rows.index[row][rows.is_real[row]]].tolist() for row in which]
    return stream(tokens, rows.input_ids.device, share=any(segment.before for segment in rows.segments))


def _source(rows: FlatRows, which: tuple[list[int], list[int]], parts: tuple[FlatRows, FlatRows]) -> Tensor:
    source = torch.empty_like(rows.input_ids)
    for numbers, part, start in zip(which, parts, (0, len(parts[0].input_ids)), strict=True):
        # Both masks list the tokens of a row in order, row by row.
        source[rows.index[numbers][rows.is_real[numbers]]] = start + part.index[part.is_real]
    return source
