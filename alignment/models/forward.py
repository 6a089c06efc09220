"""The fast forward behind the calls that TRL's trainers make.

SFT and DPO call ``model(..., labels=..., fused_lm_head=True)`` and read per-token statistics; the reward trainer calls
``model(input_ids, attention_mask).logits``. Both are answered here from one flat trunk pass, with the head on labelled
positions only.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from trl.trainer.utils import FusedCausalLMOutput

from alignment.models.flat import FlatRows, flatten, trunk_states, use_flat_attention
from alignment.models.head import scalar_at, token_statistics, transforms_logits

IGNORED = -100


def install_causal(model: PreTrainedModel) -> None:
    """Serves ``fused_lm_head=True`` calls of a causal language model by the fast forward; other calls are unchanged.

    Call it after TRL's trainer has put its own fused head on. A model whose head scales or caps its logits keeps
    TRL's.
    """
    if transforms_logits(model):
        return
    use_flat_attention(model)
    otherwise = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return otherwise(*args, **kwargs)
        return _causal_output(
            self,
            rows=_rows_of(kwargs),
            kept=_kept(kwargs),
            labels=kwargs["labels"],
            count=kwargs.get("num_items_in_batch"),
        )

    model.forward = types.MethodType(forward, model)


def install_scalar(model: PreTrainedModel) -> None:
    """Serves a sequence-classification model with one label: the score at each row's last real token, in float32."""
    use_flat_attention(model)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        rows = flatten(input_ids, attention_mask)
        return SequenceClassifierOutput(logits=scalar_at(self, rows, rows.ends)[:, None])

    model.forward = types.MethodType(forward, model)


def _kept(kwargs: dict[str, Any]) -> Tensor:
    """``[rows, columns]`` mask of real tokens of the batch as it was given."""
    mask = kwargs.get("attention_mask")
    return torch.ones_like(kwargs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _rows_of(kwargs: dict[str, Any]) -> FlatRows:
    """The stream of a batch that comes padded (attention mask) or packed (position ids that restart)."""
    input_ids, mask, positions = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None:
        return flatten(input_ids, mask)
    if positions is None:
        return flatten(input_ids, torch.ones_like(input_ids))
    flat = positions.reshape(-1)
    starts = torch.cat([(flat == 0).nonzero().flatten(), torch.tensor([flat.numel()], device=flat.device)])
    return FlatRows(
        input_ids=input_ids.reshape(-1),
        position_ids=flat,
        lengths=tuple(starts.diff().tolist()),
        kept=torch.ones_like(input_ids, dtype=torch.bool),
    )


def _causal_output(
    model: PreTrainedModel, *, rows: FlatRows, kept: Tensor, labels: Tensor, count: Tensor | int | None
) -> FusedCausalLMOutput:
    label_mask = (labels[:, 1:] != IGNORED) & kept[:, 1:] & kept[:, :-1]  # [rows, columns - 1]
    states = trunk_states(model.base_model, rows)
    # The state that predicts column c + 1 stands at column c; its place in the stream is the number of kept before it.
    place = (kept.reshape(-1).cumsum(0) - 1).view(kept.shape)[:, :-1][label_mask]
    head = model.get_output_embeddings()
    statistics = token_statistics(states[place], head.weight, labels[:, 1:][label_mask])

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(label_mask.shape).masked_scatter(label_mask, values)

    logprobs = spread(statistics.logprobs)
    total = label_mask.sum().clamp(min=1) if count is None else count
    return FusedCausalLMOutput(
        loss=-logprobs.sum() / total,
        log_probs=logprobs,
        entropy=spread(statistics.entropy),
        mean_logits=spread(statistics.mean_logits),
        is_top1=spread(statistics.is_top1),
        label_mask=label_mask,
    )
