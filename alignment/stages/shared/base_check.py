"""Refuses a base model that cannot be sampled from, whose head is not supported, or that an adapter does not fit,
before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

import torch
from peft import TaskType
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from alignment.config.launch import Engine, SamplingConfig
from alignment.config.model import AdapterConfig, Critic
from alignment.config.stage import StageConfig, TrainedConfig
from alignment.core.model_files import architecture_in
from alignment.job import StageSpec
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import name_trunk
from alignment.models.assembly.modules import refuse_without_scores
from alignment.models.forward.head import logit_factor
from alignment.models.kernels.kv_cache import RowsCache
from alignment.training.context import StageContext


def refuse_base_that_cannot_answer(spec: StageSpec, sampling: SamplingConfig, *, scored: bool) -> None:
    """Checks that the run's base model can be sampled from, unless an engine does that, and if answers are ``scored``,
    that it can give their log-probabilities. Raises ModelError: it has layers that cache something else than keys and
    values, or its head does more than one matrix product."""
    model = _without_weights(spec)
    if model is None:
        return
    if sampling.engine is Engine.own:
        RowsCache(model.config, room=0)
    if scored:
        logit_factor(model)  # raises if they are changed otherwise


def refuse_base_without_logprobs(_: StageConfig, context: StageContext) -> None:
    """Checks that the run's base model, which the stage measures, can give log-probabilities. Raises ModelError: its
    head does more than one matrix product."""
    if (model := _without_weights(context.spec)) is not None:
        logit_factor(model)  # raises if they are changed otherwise


def refuse_adapter_that_does_not_fit(spec: StageSpec, adapter: AdapterConfig) -> None:
    """Puts the adapter on the run's base model without its weights, as a stage that trains it would. Raises ModelError:
    the model lacks modules that the adapter names, or PEFT cannot adapt them, such as experts by DoRA."""
    if (model := _without_weights(spec)) is not None:
        add_adapter(name_trunk(model), adapter, TaskType.CAUSAL_LM)


def _without_weights(spec: StageSpec) -> PreTrainedModel | None:
    """The base model's shapes; None if it cannot be made from its configuration, which the first stage will report."""
    if not architecture_in(spec.base_path):
        return None
    try:
        config = AutoConfig.from_pretrained(str(spec.base_path), trust_remote_code=False)
        with torch.device("meta"), no_init_weights():
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # noqa: BLE001 - transformers raises whatever an architecture raises
        return None


def refuse_base_without_scores(config: TrainedConfig, context: StageContext) -> None:
    """Checks the base model of a stage that trains a reward model or, if it has such a setting, a separate critic.
    Raises ModelError: transformers has no scalar head for its architecture."""
    spec = context.spec
    has_scores = getattr(config, "critic", Critic.separate) is Critic.separate
    architecture = architecture_in(spec.base_path)
    if has_scores and architecture and spec.inputs["init"].is_of_run:
        refuse_without_scores(architecture, where=spec.model.source)
