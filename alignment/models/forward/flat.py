"""The trunk over real tokens only: a batch as one stream (alignment/models/forward/rows.py), padding never computed.
Position ids restart with every row, and attention stays inside a row (models/forward/attention.py). Models whose
attention cannot be restricted to rows run on the padded batch, with one warning."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.costs.recorder import is_on_cpu
from alignment.models.assembly.modules import products_dtype
from alignment.models.assembly.prefix import prefix_of, refuse_too_long
from alignment.models.forward.attention import ATTENTION, SLIDING, KeysValues
from alignment.models.forward.rows import FlatRows
from alignment.models.forward.side_by_side import side_by_side
from alignment.models.kernels.blocks import fuse_blocks, fuse_norms

log = logging.getLogger(__name__)
MULTIPLE = 64
"""Streams on a CPU in bfloat16 are padded to a multiple of this number of tokens. oneDNN generates code for every new
shape of a product, and otherwise every step would have new shapes (docs/LOG.md, 2026-11-26)."""
WINDOWED = {"cohere2", "gemma2", "gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "starcoder2"}
"""Architectures that are seen to give attention their window and cap, and to equal their padded forward
(tests/unit/models/test_architectures.py). Others window by their mask alone, or ignore the setting."""
_FULL = "full_attention"
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
"""Names in configurations for dropout on attention weights."""


def can_run_flat(model: PreTrainedModel) -> bool:
    """Whether attention can be restricted to rows: causal, without dropout, sinks and masks of its own, called through
    the interface, and full, or in ``WINDOWED`` architectures also with a sliding window or capped scores."""
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or [_FULL])
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and layer_types <= {_FULL, SLIDING}
        and (
            config.model_type in WINDOWED or not (has_window(model) or getattr(config, "attn_logit_softcapping", None))
        )
        and not getattr(config, "use_bidirectional_attention", None)
        and not any(getattr(config, name, 0.0) for name in _DROPOUTS)
        and not any(hasattr(module, "sinks") for module in model.modules())
        and not has_own_mask(model)
    )


def has_own_mask(model: PreTrainedModel) -> bool:
    """Whether layers choose what a token sees by the values of all tokens, as in Doge (Shi et al. 2025)."""
    return any(hasattr(module, "prepare_dynamic_mask") for module in model.modules())


def has_window(model: PreTrainedModel) -> bool:
    """Whether some layers have a sliding window."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (types is None or SLIDING in types)


def use_flat_attention(model: PreTrainedModel) -> bool:
    """Selects the flat attention function if the model allows it, else warns once; returns whether it did. Norms are
    fused in either case (models/kernels/blocks.py), blocks only with flat attention (models/kernels/blocks.py)."""
    fuse_norms(model)
    if not can_run_flat(model):
        log.warning(
            "%s has attention that the padding-free path does not support, so padding is computed too.",
            type(model).__name__,
        )
        return False
    model.set_attn_implementation(ATTENTION)
    fuse_blocks(model)
    return True


def trunk_states(
    trunk: PreTrainedModel, rows: FlatRows, *, keys_values: KeysValues | None = None, earlier: KeysValues | None = None
) -> Tensor:
    """``[tokens, width]`` last hidden states of the stream. ``trunk`` is the model without its head (such as
    ``LlamaModel``), with flat attention selected or not. Flat attention puts its keys and values into ``keys_values``,
    and reads those of an earlier stream from ``earlier``. Raises ModelError: a row is longer than the model's
    positions. Raises ValueError: ``keys_values`` or ``earlier`` is given, but the model's attention is not the flat
    one."""
    prefix = prefix_of(trunk)
    ahead = 0 if prefix is None else prefix.tokens
    refuse_too_long(trunk, max(rows.lengths))
    if has_window(trunk):
        refuse_prefix(trunk)
    if trunk.config._attn_implementation != ATTENTION:
        refuse_prefix(trunk)
        if keys_values is not None or earlier is not None:
            raise ValueError(f"{type(trunk).__name__} has attention that cannot return the keys and values of a stream")
        return _padded_states(trunk, rows)
    if prefix is None and keys_values is None and earlier is None:
        divided_states = side_by_side(trunk, functools.partial(_flat_states, trunk), rows)
        if divided_states is not None:
            return divided_states
    optional = {"prefix": None if prefix is None else prefix.states(), "keys_values": keys_values, "earlier": earlier}
    given = {name: value for name, value in optional.items() if value is not None}
    states = _flat_states(trunk, rows, ahead=ahead, **given)
    if keys_values is not None:
        keys_values.cut(len(rows.input_ids))
    return states


def _flat_states(trunk: PreTrainedModel, rows: FlatRows, *, ahead: int = 0, **of_attention: Any) -> Tensor:
    tokens = len(rows.input_ids)
    rows = rows.filled_up(_multiple(trunk))
    # The model passes a four-dimensional mask on, instead of building a mask that would never be read.
    unread = torch.empty(1, 1, 1, 1, device=rows.input_ids.device)
    output = trunk(
        input_ids=rows.input_ids[None],
        position_ids=rows.position_ids[None] + ahead,
        attention_mask=unread,
        use_cache=False,
        segments=rows.segments,
        **of_attention,
    )
    states: Tensor = output.last_hidden_state[0, :tokens]
    return states


def _multiple(trunk: PreTrainedModel) -> int:
    weight = trunk.get_input_embeddings().weight
    return MULTIPLE if is_on_cpu(weight) and products_dtype(weight) is torch.bfloat16 else 1


def refuse_prefix(trunk: PreTrainedModel) -> None:
    """Checks that a model without flat attention, or with a sliding window, has no prefix. Raises ModelError: it has
    one."""
    if prefix_of(trunk) is not None:
        raise ModelError(
            f"{type(trunk).__name__} has a sliding window, or attention that the padding-free path does not "
            f"support; a prefix needs full attention",
            where="adapter.kind",
            remedy="use a low-rank adapter",
        )


def _padded_states(trunk: PreTrainedModel, rows: FlatRows) -> Tensor:
    output = trunk(
        input_ids=rows.input_ids[rows.index],
        position_ids=(rows.is_real.cumsum(-1) - 1).clamp(min=0),
        attention_mask=rows.is_real.long(),
        use_cache=False,
    )
    # Rows that share tokens of the stream have equal states there, so any of them will do.
    real = rows.index[rows.is_real]
    source = torch.empty_like(rows.input_ids).scatter_(0, real, torch.arange(len(real), device=real.device))
    return output.last_hidden_state[rows.is_real][source]
