"""The trunk over real tokens only: all rows of a batch become one flat stream, and padding is never computed.

Position ids restart with every row, and attention stays inside a row: a registered attention function cuts the stream
at the rows' lengths. Rows are located by the attention mask, never by token ids, because pad may equal EOS.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

log = logging.getLogger(__name__)

ATTENTION = "flat_sdpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class FlatRows:
    """A padded batch as one stream.

    Example: rows ``[7 8 9 ·]`` and ``[5 6 · ·]`` give ``input_ids [7 8 9 5 6]``, ``position_ids [0 1 2 0 1]``,
    ``lengths (3, 2)``, ``kept`` the ``[2, 4]`` mask of real tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    kept: Tensor

    @property
    def ends(self) -> Tensor:
        """``[rows]`` index of each row's last token in the stream."""
        return torch.tensor(self.lengths, device=self.input_ids.device).cumsum(0) - 1


def flatten(input_ids: Tensor, attention_mask: Tensor) -> FlatRows:
    """Drops padding from ``[rows, columns]`` ids, wherever it stands.

    Raises:
        ValueError: a row has no real token, or padding between two real tokens.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(-1)
    if int(lengths.min()) == 0:
        raise ValueError(f"row {int(lengths.argmin())} of the batch has no real token")
    holes = (kept[:, 1:] != kept[:, :-1]).sum(-1) + kept[:, 0].int() + kept[:, -1].int() != 2
    if bool(holes.any()):
        raise ValueError(f"row {int(holes.int().argmax())} of the batch has padding between its tokens")
    positions = kept.cumsum(-1) - 1
    return FlatRows(input_ids=input_ids[kept], position_ids=positions[kept], lengths=tuple(lengths.tolist()), kept=kept)


def stream(rows: Sequence[Sequence[int]], device: torch.device) -> FlatRows:
    """Rows of token ids as one stream; there never was any padding."""
    lengths = tuple(len(row) for row in rows)
    width = max(lengths)
    kept = torch.arange(width) < torch.tensor(lengths)[:, None]
    return FlatRows(
        input_ids=torch.tensor([token for row in rows for token in row], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
        lengths=lengths,
        kept=kept.to(device),
    )


def can_run_flat(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be cut at row boundaries: full causal attention through the interface."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and layer_types == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attn_logit_softcapping", None)
    )


def use_flat_attention(model: PreTrainedModel) -> bool:
    """Selects the flat attention function where the model allows it; says so once where it does not."""
    if not can_run_flat(model):
        log.warning("%s has attention that the flat path does not serve; padding is computed.", type(model).__name__)
        return False
    model.set_attn_implementation(ATTENTION)
    return True


def trunk_states(trunk: PreTrainedModel, rows: FlatRows) -> Tensor:
    """``[tokens, width]`` last hidden states of the stream.

    ``trunk`` is the model without its head (``LlamaModel`` and the like), with flat attention selected or not.
    """
    if trunk.config._attn_implementation != ATTENTION:
        return _padded_states(trunk, rows)
    # A four-dimensional mask is handed on as it is, which spares the model building one that nobody reads.
    unread = torch.empty(1, 1, 1, 1, device=rows.input_ids.device)
    output = trunk(
        input_ids=rows.input_ids[None],
        position_ids=rows.position_ids[None],
        attention_mask=unread,
        use_cache=False,
        row_lengths=rows.lengths,
    )
    return output.last_hidden_state[0]


def _padded_states(trunk: PreTrainedModel, rows: FlatRows) -> Tensor:
    length = max(rows.lengths)
    pieces = rows.input_ids.split(list(rows.lengths))
    ids = torch.stack([nn.functional.pad(piece, (0, length - piece.numel())) for piece in pieces])
    real = torch.arange(length, device=ids.device) < torch.tensor(rows.lengths, device=ids.device)[:, None]
    output = trunk(input_ids=ids, attention_mask=real.long(), use_cache=False)
    return output.last_hidden_state[real]


def _flat_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head width]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    row_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if row_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = list(row_lengths)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    attended = [
        nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in rows
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _flat_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
