"""Which pairs a reward model learned from, where the stage that made it is one of the run's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from alignment.config.data import DataConfig
from alignment.config.faults import Fault
from alignment.config.run import RunConfig
from alignment.config.stage import RewardCardConfig, RewardConfig, StageConfig


def faults(config: RunConfig) -> Iterator[Fault]:
    """Settings of pairs that are nowhere."""
    for name, stage in config.stages.items():
        if isinstance(stage, RewardCardConfig) and not stage.learned.source and stage.learned != DataConfig():
            message = f"missing, so the other settings are read by nothing; name the pairs that {stage.reward} saw"
            yield Fault(where=f"stages.{name}.learned.source", message=message)


def with_learned(config: RunConfig) -> RunConfig:
    """The run with the pairs of each reward stage told to the cards of its model that name none themselves.

    Rows that the stage mixes in are drawn by its own name and stay out.
    """
    return replace(config, stages={name: _told(stage, config) for name, stage in config.stages.items()})


def _told(stage: StageConfig, config: RunConfig) -> StageConfig:
    if not isinstance(stage, RewardCardConfig) or stage.learned != DataConfig():
        return stage
    made = config.stages.get(stage.reward.removeprefix("stage:"))
    if not stage.reward.startswith("stage:") or not isinstance(made, RewardConfig):
        return stage
    return replace(stage, learned=replace(made.data, mix=[]))
