"""The policies that a stage compares or asks: loaded one at a time, each with its tokenizer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from alignment.core.artifacts import read_manifest
from alignment.core.errors import ModelError
from alignment.core.model_files import is_adapter
from alignment.data.tokens.tokenizer import load_tokenizer, stops_alike, tokenizer_hashes
from alignment.job import StageInput
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, refuse_other_tokenizer
from alignment.models.forward.flat import use_flat_attention
from alignment.stages.shared.served_policies import ServedPolicies
from alignment.training.context import StageContext


class Policies:
    """Loads policies, and holds one at a time; loading the held policy again costs nothing.

    ``served`` answers for them, if an engine does.
    """

    def __init__(self, context: StageContext, served: ServedPolicies | None = None) -> None:
        self.served = served
        self._context = context
        self._loaded: Lineage | None = None
        self._model: PreTrainedModel | None = None

    def load(self, policy: Lineage) -> PreTrainedModel:
        """The policy with its adapters merged, on this process's device."""
        if self._model is None or policy != self._loaded:
            self._model = None  # free the old weights before loading the new ones
            self._model = load_policy(policy, DTYPES[self._context.spec.model.dtype]).to(self._context.device)
            use_flat_attention(self._model)
            self._loaded = policy
        return self._model

    def release(self) -> None:
        """Frees the weights of the last policy."""
        self._model = self._loaded = None


def tokenizer_of(context: StageContext, stage_input: StageInput, ours: Any) -> Any:
    """The run's tokenizer if the arm shares it and stops at the same tokens, else that of the external model.

    Raises:
        ModelError: an artifact has a different tokenizer or chat template than the run's base.
    """
    path = stage_input.path
    if path is None or is_adapter(path) or read_manifest(path) is not None:
        refuse_other_tokenizer(context.spec, stage_input, ours)
        return ours
    own = load_tokenizer(path)
    alike = tokenizer_hashes(own) == tokenizer_hashes(ours) and stops_alike(own, ours)
    return ours if alike else own


def asked_tokenizer(context: StageContext, *, field: str) -> Any:
    """The tokenizer of the policy that the stage's ``field`` names: the run's, or its own if it is from outside.

    Raises:
        ModelError: an artifact has another tokenizer than the run's base, or there is no chat template.
    """
    spec, policy = context.spec, context.spec.inputs[field]
    ours = load_tokenizer(spec.base_path, spec.model.template)
    tokenizer = tokenizer_of(context, policy, ours)
    if tokenizer is not ours:
        refuse_without_template(context, policy, tokenizer, field=field)
    return tokenizer


def refuse_without_template(
    context: StageContext, stage_input: StageInput, tokenizer: Any, *, field: str = "arms"
) -> None:
    """Does nothing if conversations can be rendered for the policy that the stage's ``field`` names.

    Raises:
        ModelError: its tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{stage_input.ref} has a tokenizer without a chat template, so its prompts cannot be rendered",
            where=f"stages.{context.spec.stage}.{field}",
            remedy="put the template with which it was trained into its folder (chat_template.jinja)",
        )
