"""The stage kind ``reward_card``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.faults import Fault
from alignment.config.rules import NOT_NEGATIVE, POSITIVE
from alignment.config.run import RunConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import REWARD_CARD
from alignment.data.records import PreferencePair
from alignment.data.tokens.row_kinds import PAIRS, Limits
from alignment.rewards.rules.all_rules import RULES
from alignment.rewards.scorer_sources import REWARD, is_reference, source_field
from alignment.stages.base import DataSlot, LaunchShape, Learning, Reported, RunsOn, StageKind


@dataclass(kw_only=True, slots=True)
class RewardCardConfig:
    """Tests a reward model on pairs, and compares it with baselines that see only an answer's length or its words.

    ``reward`` may also be a model that no stage made. ``learned`` names the pairs on which it was trained. A bag of
    words is trained on the same pairs, and with ``leave_out_learned`` pairs whose prompts they contain are not judged.
    By default these are the pairs of the stage that made the model, without mixed-in rows. For a model from elsewhere
    they are unknown, and there is no bag of words. ``rule`` scores both answers, and the card shows how often it agrees
    with the model. ``invariance_pairs`` are scored again alone, padded, in another order and in float32; 0 turns this
    off. The card lists the ``num_worst`` worst pairs."""

    kind: str = "reward_card"
    reward: str = reference_to("stage:reward", "reward", external=True)
    data: DataConfig = field(default_factory=DataConfig)
    learned: DataConfig = field(default_factory=DataConfig)
    leave_out_learned: bool = True
    rule: ScoreSourceConfig | None = None
    max_length: Annotated[int, POSITIVE] = 2048
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    micro_batch_tokens: Annotated[int, POSITIVE] = not_identity(4096)
    invariance_pairs: Annotated[int, NOT_NEGATIVE] = 16
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    num_worst: Annotated[int, NOT_NEGATIVE] = 10


RULE = "rule"
"""The field of the rule whose preferences are compared with the model's."""


def _data(config: RewardCardConfig) -> list[DataSlot]:
    return [
        DataSlot(field="data", data=config.data, record=PreferencePair, rows=PAIRS),
        DataSlot(
            field="learned", data=config.learned, record=PreferencePair, rows=PAIRS, in_use=bool(config.learned.source)
        ),
    ]


def _scorers(config: RewardCardConfig) -> dict[str, ScoreSourceConfig]:
    return {} if config.rule is None else {RULE: config.rule}


def _faults(config: RewardCardConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    if config.rule is not None and (config.rule.source == REWARD or is_reference(config.rule.source)):
        rules = ", ".join(RULES)
        message = f"{config.rule.source!r} is a reward model; a rule is FILE.py:FUNCTION or one of: {rules}"
        yield Fault(where=f"{where}.{source_field(RULE)}", message=message)
    if not config.learned.source and config.learned != DataConfig():
        message = f"missing, so the other settings are unused; name the pairs that {config.reward} was trained on"
        yield Fault(where=f"{where}.learned.source", message=message)


def with_learned(config: RewardCardConfig, run: RunConfig) -> RewardCardConfig:
    """The card with ``learned`` set to the pairs of the stage that made its model, unless the card sets it itself. Rows
    that the stage mixes in are left out, because they are drawn with the stage's own random numbers."""
    made_by = run.stages.get(config.reward.removeprefix("stage:"))
    pairs = getattr(made_by, "data", None)
    if config.learned != DataConfig() or not config.reward.startswith("stage:") or not isinstance(pairs, DataConfig):
        return config
    return replace(config, learned=replace(pairs, mix=[]))


def _reported(_: RewardCardConfig) -> Reported:
    named = ("accuracy", "ece", "brier", "log_loss")
    return Reported(held_out=named, counts=("pairs",), families=("accuracy/",), half_by_chance=("accuracy",))


KIND = StageKind(
    name="reward_card",
    summary="a reward model's report card on held-out pairs",
    config=RewardCardConfig,
    revision=11,
    produces=REWARD_CARD,
    run="alignment.stages.reward_card.run:run",
    data=_data,
    scorers=_scorers,
    faults=_faults,
    completed=with_learned,
    launch=LaunchShape(runs_on=RunsOn.replicas),
    learning=Learning(limits=lambda config: Limits(row=config.max_length, too_long=config.too_long)),
    metrics=_reported,
)
