"""Prompts that a model reads once: answers are sampled, and texts scored, behind what is kept of them.

Kept are keys and values of every layer and the last state of each prompt, from the flat forward. What comes later finds
them as tokens of a stream that stood before its own (models/forward/rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.assembly.prefix import prefix_of
from alignment.models.forward.attention import ATTENTION, KeysValues
from alignment.models.forward.flat import trunk_states
from alignment.models.forward.head import label_statistics, transforms_logits
from alignment.models.forward.rows import FlatRows, behind, by_tokens, stream
from alignment.models.kernels.kv_cache import RowsCache

READ_TOKENS = 2048
"""Tokens read, or scored, at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Different prompts read together: their stream, what is kept of it, and ``[prompts, width]`` last states.

    ``asked`` says for each prompt of the reading that belongs here which row of the stream it is.
    """

    rows: FlatRows
    kept: KeysValues
    ends: Tensor
    asked: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Prompts that were read, in pieces, in order."""

    pieces: tuple[Piece, ...]

    @torch.no_grad()
    def logits(self, model: PreTrainedModel) -> Tensor:
        """``[prompts, vocabulary]`` logits of the first token behind each prompt."""
        head = model.get_output_embeddings()
        return torch.cat([head(piece.ends)[piece.asked] for piece in self.pieces])

    def cache(self, model: PreTrainedModel, *, room: int) -> RowsCache:
        """The cache of a decoding batch with a row for each prompt.

        Last columns are aligned. A prefix stands in front of all, before the padding of shorter prompts.
        """
        prefix = prefix_of(model.base_model)
        cache = RowsCache(model.config, room=room)
        columns = max(max(piece.rows.lengths) for piece in self.pieces) + (0 if prefix is None else prefix.tokens)
        rows = sum(len(piece.asked) for piece in self.pieces)
        first = 0
        for piece in self.pieces:
            places = _right_aligned(piece.rows)[piece.asked]
            cache.place_stream(piece.kept, places, first=first, rows=rows, length=columns)
            first += len(places)
        if prefix is not None:
            cache.put_in_front(prefix.states())
        return cache

    @torch.no_grad()
    def logprobs(self, model: PreTrainedModel, texts: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Sums of log p(token | what stands before it), in nats, of any number of texts behind each prompt.

        ``model`` is the one that has read the prompts. No text is empty.
        """
        found: list[list[float]] = []
        for piece in self.pieces:
            of_piece = texts[len(found) : len(found) + len(piece.asked)]
            rows = [row for row, of_prompt in zip(piece.asked.tolist(), of_piece, strict=True) for _ in of_prompt]
            sums = iter(_logprobs(model, piece, rows, [text for of_prompt in of_piece for text in of_prompt]))
            found += [[next(sums) for _ in of_prompt] for of_prompt in of_piece]
        return found


def can_read(model: PreTrainedModel) -> bool:
    """Whether the model's attention is the flat one, and its head one matrix product; ``model`` has no wrapper."""
    return model.config._attn_implementation == ATTENTION and not transforms_logits(model)


@torch.no_grad()
def read(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Reading:
    """Reads prompts (token ids), none of them empty, by a model that ``can_read``; equal ones side by side once.

    Raises:
        ModelError: a prompt is longer than the positions that the model was made for.
    """
    different = [(prompt, len(list(equal))) for prompt, equal in groupby(prompts, key=tuple)]
    pieces = []
    for some in by_tokens([len(prompt) for prompt, _ in different], READ_TOKENS):
        part = different[some.start : some.stop]
        rows, kept = stream([prompt for prompt, _ in part], model.device), KeysValues()
        ends = trunk_states(model.base_model, rows, kept=kept)[rows.ends]
        asked = torch.arange(len(part)).repeat_interleave(torch.tensor([count for _, count in part]))
        pieces.append(Piece(rows=rows, kept=kept, ends=ends, asked=asked.to(model.device)))
    return Reading(pieces=tuple(pieces))


def _right_aligned(rows: FlatRows) -> Tensor:
    """``[rows, columns]`` places in the stream with each row's last token in the last column."""
    columns = rows.place.shape[1]
    shifted = torch.arange(columns, device=rows.place.device) - (columns - rows.kept.sum(-1, keepdim=True))
    return rows.place.gather(1, shifted.clamp(min=0))


def _logprobs(model: PreTrainedModel, piece: Piece, which: list[int], texts: list[Sequence[int]]) -> list[float]:
    """Of texts behind rows ``which`` of a piece."""
    sums: list[float] = []
    for some in by_tokens([len(text) for text in texts], READ_TOKENS):
        part, after = texts[some.start : some.stop], which[some.start : some.stop]
        rows = behind(piece.rows, after, part)
        states = trunk_states(model.base_model, rows, earlier=piece.kept)
        # A text's first token is foretold by its prompt's last one, every other by the one before it.
        foretelling = states.roll(1, 0)
        foretelling[rows.place[:, 0]] = piece.ends[after]
        found = label_statistics(model, foretelling, rows.input_ids).logprobs
        sums += [float(own.sum()) for own in found.split([len(text) for text in part])]
    return sums
