"""Refuses a base model without scores before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from alignment.config.critic import Critic
from alignment.config.stage import TrainedConfig
from alignment.core.model_files import architecture_in
from alignment.models.assembly.scalar_architectures import refuse_without_scores
from alignment.training.context import StageContext


def refuse_base_without_scores(config: TrainedConfig, context: StageContext) -> None:
    """Checks the base model of a stage that trains a reward model or, if it has such a setting, a separate critic.

    Raises:
        ModelError: transformers has no scalar head for its architecture.
    """
    spec = context.spec
    has_scores = getattr(config, "critic", Critic.separate) is Critic.separate
    architecture = architecture_in(spec.base_path)
    if has_scores and architecture and spec.inputs["init"].is_of_run:
        refuse_without_scores(architecture, where=spec.model.source)
