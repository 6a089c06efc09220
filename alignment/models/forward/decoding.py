"""Prepares a model for decoding, with attention that reads the cache in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from alignment.models.forward.attention import ATTENTION as FLAT_ATTENTION
from alignment.models.forward.attention import KeysValues
from alignment.models.forward.flat import has_own_mask
from alignment.models.kernels.kv_cache import ATTENTION, RowsCache
from alignment.models.kernels.sdpa_order import without_cudnn

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
    hides = _calls_the_interface(model) or _hides_by_its_mask(model)
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

    All rows see the tokens of ``beginning`` too, before those of the cache.
    """
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
    many columns as were filled. Doge adds to the mask what it computes from the values.
    """
    return model._can_set_attn_implementation() and not has_own_mask(model)


def _hides_by_its_mask(model: PreTrainedModel) -> bool:
    return model.config.model_type in MASKED and not getattr(model.config, "alibi", False)
