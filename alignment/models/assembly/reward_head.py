"""Loads a saved reward model: trunk, its own adapter, and the scalar head."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.adapters import put_back
from alignment.models.assembly.beside_text import freeze_beside_text
from alignment.models.assembly.load import DTYPES, lineage, load_scalar, load_scalar_head
from alignment.models.forward.causal import install_scalar
from alignment.models.forward.side_by_side import keep_in_one_stream
from alignment.models.kernels.nf4 import quantize_trunk

HEAD = "head.safetensors"
"""The file of a reward model's scalar head, in its artifact."""
AT_TURN_END = "scored_at_turn_end"
"""The key in an exported reward model's config.json that says: the score is that of the token that ends the turn."""


def load_reward_model(
    spec: StageSpec, stage_input: StageInput, *, device: torch.device, trained: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """The reward model behind a reference; with ``trained``, a value model that starts from it.

    ``trained`` is the dtype of its weights if they are all trained; under an adapter they are frozen. Weights in four
    bits are quantised on ``device``; the caller moves the rest.

    Its own adapter, the top one, is applied as in training, so that the scores are the same.

    Raises:
        ModelError: the artifact has no scalar head.
    """
    assert stage_input.path is not None, "the plan refuses 'base' in a reward slot"
    head = stage_input.path / HEAD
    if not head.exists():
        raise ModelError(f"there is no scalar head ({HEAD}) here", where=str(stage_input.path))
    saved = lineage(spec, stage_input)
    full = not saved.adapters
    model = load_scalar(saved.weights, trained if full and trained is not None else DTYPES[spec.model.dtype])
    load_scalar_head(model, head)
    install_scalar(model)
    if full:
        model.requires_grad_(trained is not None)
        freeze_beside_text(model)
        keep_in_one_stream(model)
        return model
    if saved.adapters[-1].nf4:
        quantize_trunk(model, device)
    return put_back(model, [adapter.path for adapter in saved.beside], trainable=trained is not None)


def zero_head(model: PreTrainedModel | PeftModel) -> None:
    """Sets the head and the offset of a reward model to zero, so that all its scores are 0."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.score.modules_to_save["default"] if isinstance(model, PeftModel) else base.score
    with torch.no_grad():
        head.weight.zero_()
        base.score_offset.zero_()
