"""Whether a score depends on what it must not depend on: other rows in the batch, their order, or padding. Rows are
scored as for the report card, and again each alone, in another order, and padded on either side by the model's plain
forward, which uses neither the flat stream nor its attention. In exact arithmetic nothing would change. In bfloat16
sums are rounded a little differently; scoring in float32 separates rounding from a fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from alignment.models.forward.answers import scalar_scores, unwrapped
from alignment.models.forward.rows import by_tokens, stream
from alignment.records.reward_card import Change, Rescored

Rows = Sequence[Sequence[int]]
Score = Callable[[Rows], Tensor]
"""``[rows]`` scores of rows of token ids."""

TOLERANCE = 1e-3
"""A share of the scores' standard deviation; float32 rounding explains no larger change. Chosen, not tuned."""
TOGETHER = 8
"""Rows that are padded to one length and scored at once."""


@torch.no_grad()
def flat_scores(model: PreTrainedModel, rows: Rows, *, tokens: int, device: torch.device) -> Tensor:
    """``[rows]`` scores, at most ``tokens`` at a time; common prefixes are computed once."""
    lengths = [len(row) for row in rows]
    micro_batches = [
        rows[micro_batch.start : micro_batch.stop] for micro_batch in by_tokens(lengths, tokens, behind=_added(rows))
    ]
    return torch.cat([scalar_scores(model, stream(micro_batch, device)) for micro_batch in micro_batches]).cpu()


def _added(rows: Rows) -> list[int]:
    """Tokens that each row adds to the row before it, after their common prefix."""
    added = [len(row) for row in rows]
    for index in range(1, len(rows)):
        before, row = rows[index - 1], rows[index]
        same = next((at for at, pair in enumerate(zip(before, row, strict=False)) if pair[0] != pair[1]), len(row))
        added[index] -= same
    return added


@torch.no_grad()
def padded_scores(model: PreTrainedModel, rows: Rows, *, left: bool, device: torch.device) -> Tensor:
    """``[rows]`` scores at each row's last token, by the trunk's plain forward over padded rows."""
    whole = unwrapped(model)
    scores = []
    for first in range(0, len(rows), TOGETHER):
        part = [torch.tensor(row) for row in rows[first : first + TOGETHER]]
        side = "left" if left else "right"
        ids, mask = (
            pad_sequence(rows, batch_first=True, padding_side=side).to(device)
            for rows in (part, [torch.ones_like(row) for row in part])
        )
        states = whole.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        last = torch.full((len(part),), -1) if left else mask.sum(-1) - 1
        with torch.autocast(device.type, enabled=False):
            at_end = states[torch.arange(len(part)), last].float()
            scores.append((whole.score(at_end).squeeze(-1) - whole.score_offset).cpu())
    return torch.cat(scores)


def moved(
    score: Score, padded: Callable[[Rows, bool], Tensor] | None, rows: Rows, generator: torch.Generator
) -> Rescored:
    """How far each score moves under each change; ``rows`` are pairs, chosen answer first. ``padded`` takes rows and
    whether to pad on the left; it is None if the model cannot run on padded rows."""
    usual = score(rows)
    order = torch.randperm(len(rows), generator=generator)
    reordered = torch.empty_like(usual)
    reordered[order] = score([rows[index] for index in order.tolist()])
    changed = {"alone": torch.cat([score([row]) for row in rows]), "in another order": reordered}
    if padded is not None:
        changed |= {"padded on the left": padded(rows, True), "padded on the right": padded(rows, False)}
    return Rescored(
        spread=float(usual.std(correction=0)),
        changes={name: _between(usual, scores) for name, scores in changed.items()},
    )


def _between(usual: Tensor, changed: Tensor) -> Change:
    pairs = [scores.view(-1, 2) for scores in (usual, changed)]
    usual_signs, changed_signs = (torch.sign(pair[:, 0] - pair[:, 1]) for pair in pairs)
    return Change(largest=float((usual - changed).abs().max()), flips=int((usual_signs != changed_signs).sum()))


def beyond_rounding(exact: Rescored) -> list[str]:
    """The changes that move a float32 score by more than rounding explains."""
    assert exact.spread is not None, "it was measured"
    limit = TOLERANCE * max(exact.spread, 1e-6)
    return [name for name, change in exact.changes.items() if not change.largest <= limit]
