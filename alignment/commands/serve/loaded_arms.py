"""Policies as plain models of transformers that end answers where they learned to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from alignment.commands.shared.generation_settings import generation_settings
from alignment.commands.shared.loaded_policies import parts_of
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.config.model import Dtype, TemplateChoice
from alignment.core.errors import DataError
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.turns import Message
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.training.device import own_device


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedArm:
    """A model with all adapters merged, and the tokenizer that it was trained with."""

    name: str
    model: PreTrainedModel
    tokenizer: Any


def load_arms(policies: Sequence[StoredPolicy]) -> list[LoadedArm]:
    """Loads the policies on this process's device.

    Raises:
        ArtifactError: an artifact is missing or damaged.
        ModelError: a model cannot be loaded.
        DataError: a policy has no usable chat template.
    """
    return [_load(policy) for policy in policies]


def _load(policy: StoredPolicy) -> LoadedArm:
    lineage, tokenizer = lineage_and_tokenizer(policy)
    model = merged(lineage, tokenizer, policy.dtype).to(own_device())
    return LoadedArm(name=policy.name, model=model.requires_grad_(False), tokenizer=tokenizer)


def lineage_and_tokenizer(policy: StoredPolicy) -> tuple[Lineage, Any]:
    """What the policy consists of; a first prompt is rendered, so that an unusable template is refused at once.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        ModelError: there is no usable tokenizer.
        DataError: there is no usable chat template.
    """
    artifact, base = (Path(folder) if folder else None for folder in (policy.artifact, policy.base))
    template = TemplateChoice(source=policy.chat_template, options=policy.template_options)
    lineage, tokenizer = parts_of(artifact, base, template)
    try:
        prompt_ids(tokenizer, [Message(role="user", content="Hi.")])
    except DataError as error:
        raise DataError(error.message, where=policy.name, remedy=error.remedy) from error
    return lineage, tokenizer


def merged(lineage: Lineage, tokenizer: Any, dtype: str) -> PreTrainedModel:
    """The policy's model with all adapters merged, which generates as ``generation_config`` says."""
    model = load_policy(lineage, DTYPES[Dtype(dtype)])
    model.config.use_cache = True
    model.generation_config = generation_config(tokenizer)
    return model


def generation_config(tokenizer: Any) -> GenerationConfig:
    """Ends answers at every token that ends one in training; see ``generation_settings``."""
    return generation_settings(end_ids(tokenizer), tokenizer.pad_token_id)
