"""What sampling needs of the run's base model, checked before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from alignment.stages.sample.config import SampleConfig
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.training.context import StageContext


def refuse_base(config: SampleConfig, context: StageContext) -> None:
    """Checks the base model of the policy.

    Raises:
        ModelError: it cannot be sampled from.
    """
    if context.spec.inputs["policy"].is_of_run:
        refuse_base_that_cannot_answer(context.spec, config.sampling, scored=False)
