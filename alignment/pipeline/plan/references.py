"""References between stages: which there are, whether each fits its slot, and the order they impose."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping

from alignment.config.did_you_mean import nearest, suggestion
from alignment.config.evaluation import UNTRAINED_ARMS
from alignment.config.faults import Fault
from alignment.config.stage import (
    ForgettingConfig,
    PpoConfig,
    ReportConfig,
    RewardCardConfig,
    StageConfig,
)
from alignment.config.typed import field_types
from alignment.rewards.scorer_sources import REWARD, is_reference, source_field
from alignment.stages.ppo.scorers import in_use

BASE = "base"
_STAGE = "stage:"
_EXTERNAL = ("path:", "hub:", "bundled:")
_NOUNS = {
    "policy": "a policy",
    "reward": "a reward model",
    "evaluation": "an evaluation",
    "reward_card": "a reward card",
    "forgetting": "a measurement of forgetting",
    "report": "a report",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place in a stage's configuration that holds a reference.

    Example: ``Slot(field="reward", takes=("reward",), ref="stage:reward")``; ``field`` is ``arms[2]`` inside a list.
    ``external``: a reward model that no stage made fits too, from a folder or a hub. ``optional``: it may be null.
    """

    field: str
    takes: tuple[str, ...]
    ref: str
    external: bool = False
    optional: bool = False

    @property
    def stage(self) -> str | None:
        """The stage it names, if it names one."""
        return self.ref.removeprefix(_STAGE) if self.ref.startswith(_STAGE) else None

    @property
    def is_arm(self) -> bool:
        """Whether it is one of several in a list."""
        return self.field.endswith("]")

    @property
    def is_base(self) -> bool:
        """Whether it stands for the run's base model, with or without a prompt or examples."""
        return self.ref in UNTRAINED_ARMS


def slots(stage: StageConfig) -> Iterator[Slot]:
    """Every filled slot of a stage, in the order of its fields."""
    kind: type = type(stage)
    for field in dataclasses.fields(stage):
        takes = field.metadata.get("reference")
        value = getattr(stage, field.name)
        if takes is None or value is None:
            continue
        if isinstance(value, str):
            yield Slot(
                field=field.name,
                takes=takes,
                ref=value,
                external=isinstance(stage, PpoConfig | RewardCardConfig) and field.name == REWARD,
                optional=types.NoneType in typing.get_args(field_types(kind)[field.name]),
            )
        else:
            for number, ref in enumerate(value):
                yield Slot(field=f"{field.name}[{number}]", takes=takes, ref=ref)
    if isinstance(stage, PpoConfig):
        yield from _scorer_slots(stage)


def _scorer_slots(stage: PpoConfig) -> Iterator[Slot]:
    """Scorers that are reward models of their own."""
    for name, scorer in in_use(stage).items():
        if is_reference(scorer.source):
            yield Slot(field=source_field(name), takes=("reward",), ref=scorer.source, external=True)


def inputs_of(name: str, stages: Mapping[str, StageConfig]) -> list[str]:
    """The stages that must be done first. A report shows the whole run, so it waits for every other stage."""
    stage = stages[name]
    if isinstance(stage, ReportConfig):
        return [other for other, config in stages.items() if not isinstance(config, ReportConfig)]
    return list(dict.fromkeys(slot.stage for slot in slots(stage) if slot.stage is not None))


def faults(stages: Mapping[str, StageConfig]) -> list[Fault]:
    """Everything wrong with the references of a run, cycles included."""
    found = [fault for name, stage in stages.items() for fault in _stage_faults(name, stage, stages)]
    if found:
        return found
    cycle = _cycle(stages)
    if cycle:
        return [Fault(where=f"stages.{cycle[0]}", message=f"depends on itself: {' → '.join(cycle)}")]
    return []


def in_order(stages: Mapping[str, StageConfig]) -> list[str]:
    """Stage names so that each follows its inputs, otherwise in the recipe's order. Call it after ``faults``."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name not in done:
            for other in inputs_of(name, stages):
                visit(other)
            done.append(name)

    for name in stages:
        visit(name)
    return done


def _stage_faults(name: str, stage: StageConfig, stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    seen = set()
    if isinstance(stage, ForgettingConfig) and not stage.arms:
        yield Fault(where=f"stages.{name}.arms", message="names no policy; write those to measure, such as [stage:sft]")
    for slot in slots(stage):
        where = f"stages.{name}.{slot.field}"
        problem = _problem(slot, stages)
        if problem:
            yield Fault(where=where, message=problem)
        elif slot.is_base and isinstance(stage, ForgettingConfig):
            yield Fault(where=where, message=f"{slot.ref!r} was not trained; the base model is measured anyway")
        elif slot.is_base and slot.ref != BASE and not slot.is_arm:
            yield Fault(
                where=where, message=f"{slot.ref!r} is an arm of an evaluation, not a model to start from; write 'base'"
            )
        elif slot.is_arm and slot.ref in seen:
            yield Fault(where=where, message=f"{slot.ref!r} stands there twice")
        if slot.is_arm:
            seen.add(slot.ref)


def _problem(slot: Slot, stages: Mapping[str, StageConfig]) -> str | None:
    if slot.is_base or slot.ref.startswith(_EXTERNAL):
        return _external_problem(slot, stages)
    if slot.stage is None:
        known = [*(UNTRAINED_ARMS if slot.is_arm else (BASE,)), *(_STAGE + name for name in stages)]
        close = nearest(slot.ref, known)
        meant = f"did you mean {close!r}? Else " if close else ""
        return f"{slot.ref!r} is no reference; {meant}write base, stage:NAME, path:FOLDER or hub:ORG/NAME@REVISION"
    if slot.stage not in stages:
        return f"no stage '{slot.stage}' in this run; {_ended(suggestion(slot.stage, stages))}{_otherwise(slot)}"
    produced = stages[slot.stage].produces
    if produced not in slot.takes:
        return f"{slot.ref!r} is {_NOUNS[produced]}; {what_fits(slot, stages)}"
    return None


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith("?") else f"{sentence}."


def _otherwise(slot: Slot) -> str:
    if slot.is_arm:
        return " Otherwise take this arm out."
    return " Otherwise write null." if slot.optional else ""


def _external_problem(slot: Slot, stages: Mapping[str, StageConfig]) -> str | None:
    if "policy" in slot.takes or slot.ref.startswith("path:") or (slot.external and slot.ref.startswith("hub:")):
        return None
    return f"{slot.ref!r} is a language model; {what_fits(slot, stages)}"


def what_fits(slot: Slot, stages: Mapping[str, StageConfig]) -> str:
    """``this slot takes a reward model. Use 'stage:reward'.``"""
    wanted = " or ".join(_NOUNS[kind] for kind in slot.takes)
    fitting = [name for name, stage in stages.items() if stage.produces in slot.takes]
    advice = "No stage of this run makes one."
    if fitting:
        advice = f"Use {' or '.join(repr(_STAGE + name) for name in fitting)}."
    elif slot.external:
        advice += " From outside it takes a …ForSequenceClassification with one label, by path: or hub:."
    return f"this slot takes {wanted}. {advice}"


def _cycle(stages: Mapping[str, StageConfig]) -> list[str]:
    """The first cycle, first name repeated at the end, or nothing."""
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in finished:
            for other in inputs_of(name, stages):
                if found := visit(other, [*trail, name]):
                    return found
            finished.add(name)
        return []

    for name in stages:
        if found := visit(name, []):
            return found
    return []
