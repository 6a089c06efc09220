"""What PPO needs of the run's base model, checked before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from alignment.stages.ppo.config import PpoConfig
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.scalar_check import refuse_base_without_scores
from alignment.training.context import StageContext


def refuse_base(config: PpoConfig, context: StageContext) -> None:
    """Checks the base model of the policy and, if it is separate, of the critic.

    Raises:
        ModelError: transformers has no scalar head for its architecture, it cannot be sampled from, or its head does
            more than one matrix product.
    """
    refuse_base_without_scores(config, context)
    if context.spec.inputs["init"].is_of_run:
        refuse_base_that_cannot_answer(context.spec, config.sampling, scored=True)
