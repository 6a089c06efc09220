"""Parts of a model that only images or sounds pass through. Rows are text, so these parts are not trained.

If they were, distributed training would wait in vain for their gradients, and weight decay would shrink them.
"""

from __future__ import annotations

import re

from transformers import PreTrainedModel


def parts_beside_text(model: PreTrainedModel) -> list[str]:
    """Paths of the modules that text does not pass through; none in models of text alone."""
    names = [*_beside_text_model(model), *_within_text_model(model)]
    return [f"{model.base_model_prefix}.{name}" for name in names]


def _beside_text_model(model: PreTrainedModel) -> list[str]:
    """The trunk's modules beside its text model, if this is a part of its own."""
    if model.config.get_text_config() is model.config:
        return []
    text = model.base_model.get_decoder()
    return [
        name for name, part in model.base_model.named_children() if all(module is not text for module in part.modules())
    ]


def _within_text_model(model: PreTrainedModel) -> list[str]:
    """The modules in a text model itself: layers that text skips (Llama 3.2 Vision), encoders (Phi-4-multimodal)."""
    skipped = getattr(model.config.get_text_config(), "cross_attention_layers", None) or []
    names = {"embed_tokens_extend", *(f"layers.{number}" for number in skipped)}
    return [name for name, _ in model.base_model.named_modules() if name in names]


def freeze_beside_text(model: PreTrainedModel) -> None:
    """Excludes these parts from training."""
    for path in parts_beside_text(model):
        model.get_submodule(path).requires_grad_(False)


def pattern_beside_text(model: PreTrainedModel) -> str | None:
    """A regular expression of the paths inside these parts, as PEFT's ``exclude_modules`` takes it."""
    paths = parts_beside_text(model)
    return rf"(?:{'|'.join(map(re.escape, paths))})(?:\..*)?" if paths else None
