"""What several kinds of stage say of their scorers. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alignment.config.faults import Fault
from alignment.config.scoring import ScoreSourceConfig
from alignment.core.artifacts import REWARD_MODEL
from alignment.rewards.scorer_sources import REWARD, is_reference, source_field
from alignment.stages.base import Slot


def reward_model_slots(scorers: Mapping[str, ScoreSourceConfig]) -> Iterator[Slot]:
    """References for the scorers that are other reward models than the stage's, by the field of each scorer."""
    for field, scorer in scorers.items():
        if is_reference(scorer.source):
            yield Slot(field=source_field(field), takes=(REWARD_MODEL,), ref=scorer.source, external=True)


def missing_reward_faults(scorers: Mapping[str, ScoreSourceConfig], reward: str | None, where: str) -> Iterator[Fault]:
    """Scorers that are the stage's reward model, where it names none."""
    for field, scorer in scorers.items():
        if scorer.source == REWARD and reward is None:
            message = (
                f"'{REWARD}' needs the model in {where}.reward, which is null; name a model, or remove this scorer"
            )
            yield Fault(where=f"{where}.{source_field(field)}", message=message)
