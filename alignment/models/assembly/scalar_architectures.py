"""Which architectures transformers can put under a scalar head. No model is imported, so that it is known before a
run."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from alignment.core.errors import ModelError


def refuse_without_scores(model_type: str, *, where: str) -> None:
    """Checks that an architecture has a model with a scalar head, as reward models and separate critics need it.

    Raises:
        ModelError: it has none.
    """
    if model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return
    raise ModelError(
        f"transformers has no model with a score for the architecture {model_type!r}, which a reward model or a "
        "separate critic needs",
        where=where,
        remedy="use a base of another family, such as Llama, Qwen, Mistral or Gemma; or do without: PPO has "
        "critic=shared or none and other scorers, and DPO and KTO need no reward model",
    )
