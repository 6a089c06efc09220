"""Whether a score depends on what it must not: the rows beside it, their order, and padding.

Rows are scored as a card scores them, and again each alone, in another order, and padded on either side by the model's
plain forward, which shares neither the stream nor its attention. In exact arithmetic nothing would change; in
bfloat16 sums come out a little differently, and float32 tells rounding from a fault.
"""

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
"""Of the scores' standard deviation, beyond which float32 no longer explains a difference. Chosen, not tuned."""
TOGETHER = 8
"""Rows padded to one length."""


@torch.no_grad()
def flat_scores(model: PreTrainedModel, rows: Rows, *, tokens: int, device: torch.device) -> Tensor:
    """``[rows]`` scores, as many at a time as have at most ``tokens``; common beginnings are computed once."""
    lengths = [len(row) for row in rows]
    micro_batches = [
        rows[micro_batch.start : micro_batch.stop] for micro_batch in by_tokens(lengths, tokens, behind=_behind(rows))
    ]
    return torch.cat([scalar_scores(model, stream(micro_batch, device)) for micro_batch in micro_batches]).cpu()


def _behind(rows: Rows) -> list[int]:
    """Tokens that each row adds behind the one before it, of which it repeats the beginning."""
    added = [len(row) for row in rows]
    for index in range(1, len(rows)):
        before, row = rows[index - 1], rows[index]
        same = next((at for at, pair in enumerate(zip(before, row, strict=False)) if pair[0] != pair[1]), len(row))
        added[index] -= same
    return added


@torch.no_grad()
def padded_scores(model: PreTrainedModel, rows: Rows, *, left: bool, device: torch.device) -> Tensor:
    """``[rows]`` scores by the trunk's plain forward over padded rows, at each one's last token."""
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
    """How far each score moves, by what was changed; ``rows`` are pairs, chosen answer first.

    ``padded`` takes whether padding stands on the left; None where the model cannot run so.
    """
    usual = score(rows)
    order = torch.randperm(len(rows), generator=generator)
    turned = torch.empty_like(usual)
    turned[order] = score([rows[index] for index in order.tolist()])
    changed = {
        "alone": torch.cat([score([row]) for row in rows]),
        "in another order": turned,
    }
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
    """The changes that move a score in float32 by more than rounding does."""
    assert exact.spread is not None, "it was measured"
    limit = TOLERANCE * max(exact.spread, 1e-6)
    return [name for name, change in exact.changes.items() if not change.largest <= limit]
