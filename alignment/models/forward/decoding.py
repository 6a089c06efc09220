"""Prepares a model for decoding, with attention that reads the cache in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from alignment.models.forward.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.forward.attention import KeysValues
from alignment.models.forward.flat import has_own_mask
from alignment.models.kernels.kv_cache import ATTENTION, RowsCache
from alignment.models.kernels.sdpa import without_cudnn

MASKED = {"falcon", "gpt_neox_japanese", "xglm"}
"""Architectures that do not call attention functions by name, but are seen to hide by their mask what is not filled
(tests/unit/models/test_architectures.py); Falcon only without ALiBi."""


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Prepares the model for steps of one token per row, and undoes that."""
    # Parts may differ: Gemma 4's encoder of sounds would refuse the function of its text model.
    implementations = [(config, config._attn_implementation) for config in _configs(model)]
    ours = _gets_ours(model)
    try:
        if ours:
            model.set_attn_implementation(ATTENTION)
        with without_cudnn():
            yield
    finally:
        if ours:
            for config, implementation in implementations:
                config._attn_implementation = implementation


def may_see_room(model: PreTrainedModel) -> bool:
    """Whether the model may see the columns that its ``RowsCache`` allocates ahead, outside of ``decoding``."""
    # Other attention functions may mistake allocated columns for filled ones.
    hides_by_mask = model.config.model_type in MASKED and not getattr(model.config, "alibi", False)
    hides = hides_by_mask or _calls_the_interface(model)
    return _gets_ours(model) or (model.config._attn_implementation in ("eager", "sdpa") and hides)


def next_logits(
    model: PreTrainedModel,
    ids: Tensor,
    seen: Tensor,
    positions: Tensor,
    cache: RowsCache,
    *,
    beginning: KeysValues | None = None,
) -> Tensor:
    """``[rows, vocabulary]`` logits of the token after the last column; ``ids [rows, new columns]`` enter the cache.
    All rows see the tokens of ``beginning`` too, before those of the cache."""
    common = {} if beginning is None else {"beginning": beginning}
    output = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
        **common,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs of the model and of its parts, each before those inside it, because setting one sets those too."""
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in configs:  # also those that are appended here
        configs += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
    return configs


def _gets_ours(model: PreTrainedModel) -> bool:
    return model.config._attn_implementation in ("sdpa", FLAT_ATTENTION) and _calls_the_interface(model)


def _calls_the_interface(model: PreTrainedModel) -> bool:
    """Whether the model's layers call attention functions by name, with a mask, and leave scores and windows to them.
    GPT-Neo places its window by the number of columns; Bloom and Falcon have a bias (ALiBi, Press et al. 2022) with as
    many columns as were filled. Doge adds to the mask what it computes from the values."""
    return model._can_set_attn_implementation() and not has_own_mask(model)


BLOCK = 256
"""Tokens of the vocabulary whose probabilities are first summed."""


def sampled_tokens(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """``[rows]`` tokens from ``[rows, vocabulary]`` logits: the first token whose cumulative probability exceeds the
    row's number in ``uniform [rows]``, float64 in [0, 1). Weights are exp(z − max z) in float32. Sums of blocks are
    accumulated in float64, so that no sum over the whole vocabulary is rounded to float32. The search finds a block
    first, then the token in it."""
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=torch.float32, device=logits.device)
    weights[:, :vocabulary] = logits
    weights[:, vocabulary:] = float("-inf")
    weights.sub_(weights.amax(-1, keepdim=True))
    if temperature != 1.0:
        weights.div_(temperature)
    weights = weights.exp_().view(rows, blocks, BLOCK)
    block, rest = _invert(weights.sum(-1).double(), uniform)
    inside = weights[torch.arange(rows, device=block.device), block]
    return block * BLOCK + _invert(inside.double(), rest)[0]


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of ``[rows, choices]``: the choice whose share contains ``uniform``, and its position in it, in [0,
    1]. A choice of weight 0 is never taken, not even for a ``uniform`` of 0 or 1."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, choice)
    rest = (target - (cumulative.gather(-1, choice) - weight)) / weight
    return choice.squeeze(-1), rest.clamp(0.0, 1.0).squeeze(-1)
