"""What an evaluation needs of the run's base model, checked before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.data.records import HeldOutPrompt
from alignment.rewards.scorer_sources import CHOICE
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.prompt_lengths import refuse_long_prompts
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext


def refuse_base(config: EvaluateConfig, context: StageContext) -> None:
    """Checks the base model of the arms, and the first turn of every arm.

    Raises:
        ModelError: a prompt and its answer may be longer than the base model's positions, it cannot be sampled from, or
            its head does more than one matrix product.
        DataError: a row cannot be read or rendered, or there are too few examples.
    """
    refuse_long_prompts(config, context)
    spec = context.spec
    arms = [name for name in config.arms if spec.arms[name].is_of_run]
    if arms:
        refuse_base_that_cannot_answer(spec, config.sampling, scored=_are_scored(arms, config, context))


def _are_scored(arms: Sequence[str], config: EvaluateConfig, context: StageContext) -> bool:
    """Whether log-probabilities are asked for, as in run.py: of the answers of arms that are compared with the
    reference, of choices, or of reference answers."""
    spec = context.spec
    others = {name for name in arms if spec.arms[name].path != spec.inputs["reference"].path}
    if others - {FEW_SHOT, PROMPTED} and config.answers.temperature in (0.0, 1.0):
        return True
    if any(metric.source == CHOICE for metric in config.metrics):
        return True
    return any(row.reference for row in rows_of(context, HeldOutPrompt, config.data))
