"""References between stages: where they are, whether each fits its slot, and the order that they impose."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.config.faults import Fault, nearest, suggestion, with_scheme
from alignment.config.run import RunConfig
from alignment.config.stage import StageConfig
from alignment.config.typed import field_types
from alignment.core.artifacts import EVALUATION, FORGETTING, POLICY, REPORT, REWARD_CARD, REWARD_MODEL, ROWS
from alignment.core.fingerprint import canonical, digest, file_sha256
from alignment.data.chat_template import template_text
from alignment.pipeline.plan import made_rows, scorer_checks
from alignment.pipeline.sources.model_sources import ModelSource
from alignment.stages.base import Slot
from alignment.stages.registry import gates_of, kind_of

BASE = "base"
_STAGE = "stage:"
_EXTERNAL = ("path:", "hub:", "bundled:")
_NOUNS = {
    POLICY: "a policy",
    REWARD_MODEL: "a reward model",
    EVALUATION: "an evaluation",
    REWARD_CARD: "a reward card",
    FORGETTING: "a measurement of forgetting",
    REPORT: "a report",
    ROWS: "a set of rows",
}


def stage_of(slot: Slot) -> str | None:
    """The stage that a slot names, if it names one."""
    return made_rows.stage_named(slot.ref)


def is_arm(slot: Slot) -> bool:
    """Whether the slot is an item of a list."""
    return slot.field.endswith("]")


def is_base(slot: Slot) -> bool:
    """Whether the slot names the run's base model, with or without a prompt or examples."""
    return slot.ref in UNTRAINED_ARMS


def is_external(slot: Slot) -> bool:
    """Whether the slot names a model from outside the run."""
    return slot.ref.startswith(_EXTERNAL)


def slots(stage: Any) -> Iterator[Slot]:
    """Every filled slot of a stage, in the order of its fields."""
    kind: type = type(stage)
    for field in dataclasses.fields(kind):
        takes = field.metadata.get("reference")
        value = getattr(stage, field.name)
        if takes is None or value is None:
            continue
        if isinstance(value, str):
            yield Slot(
                field=field.name,
                takes=takes,
                ref=value,
                external=field.metadata["external"],
                optional=types.NoneType in typing.get_args(field_types(kind)[field.name]),
            )
        else:
            for number, ref in enumerate(value):
                yield Slot(field=f"{field.name}[{number}]", takes=takes, ref=ref)
    yield from kind_of(stage).slots(stage)
    yield from made_rows.slots(stage)


def inputs_of(name: str, stages: Mapping[str, StageConfig]) -> list[str]:
    """The stages that must be done before this one. A report shows the whole run, so it waits for all others."""
    stage = stages[name]
    if kind_of(stage).in_driver:
        return [other for other, config in stages.items() if not kind_of(config).in_driver]
    named = (stage_of(slot) for slot in slots(stage))
    return list(dict.fromkeys(other for other in named if other is not None))


def faults(stages: Mapping[str, StageConfig], *, unreadable: Container[str] = ()) -> list[Fault]:
    """Everything wrong with the references of a run, cycles included; nothing is said of references to ``unreadable``
    stages, which have faults of their own."""
    stage_faults = [fault for name, stage in stages.items() for fault in _stage_faults(name, stage, stages, unreadable)]
    if stage_faults:
        return stage_faults
    cycle = _cycle(stages)
    if cycle:
        return [Fault(where=f"stages.{cycle[0]}", message=f"depends on itself: {' → '.join(cycle)}")]
    return []


def in_order(stages: Mapping[str, StageConfig]) -> list[str]:
    """The stages' names, each after its inputs, otherwise in the recipe's order. Call ``faults`` first."""
    done: list[str] = []

    def visit(name: str) -> None:
        if name not in done:
            for other in inputs_of(name, stages):
                visit(other)
            done.append(name)

    for name in stages:
        visit(name)
    return done


def _stage_faults(
    name: str, stage: StageConfig, stages: Mapping[str, StageConfig], unreadable: Container[str]
) -> Iterator[Fault]:
    seen = set()
    for slot in (slot for slot in slots(stage) if stage_of(slot) not in unreadable):
        where = f"stages.{name}.{slot.field}"
        problem = _absent_default(slot, stage, stages, where) or _problem(slot, stages)
        if problem:
            yield Fault(where=where, message=problem)
        elif is_base(slot) and slot.ref != BASE and not is_arm(slot):
            message = f"{slot.ref!r} can only be an arm of an evaluation, not a model to start from; write 'base'"
            yield Fault(where=where, message=message)
        elif is_arm(slot) and slot.ref in seen:
            yield Fault(where=where, message=f"{slot.ref!r} is listed twice")
        if is_arm(slot):
            seen.add(slot.ref)


def _absent_default(slot: Slot, config: StageConfig, stages: Mapping[str, StageConfig], where: str) -> str | None:
    """What to write if the run lacks the stage that a setting names by default, and the base model may take its place.
    The recipe may not contain this setting, so a message must say more than that the stage is missing."""
    absent = stage_of(slot)
    if absent is None or absent in stages or POLICY not in slot.takes or slot.optional:
        return None
    if slot.ref != getattr(kind_of(config).config(), slot.field, None):
        return None
    others = [name for name, other in stages.items() if other is not config and kind_of(other).produces in slot.takes]
    close = nearest(absent, others)
    hint = f"Did you mean '{_STAGE}{close}'? Otherwise set" if close else "Set"
    return (
        f"no stage '{absent}' in this run, and '{slot.ref}' is the default of this setting. {hint} {where}=base to use "
        f"the base model (in the recipe: {slot.field}: base)"
    )


def _problem(slot: Slot, stages: Mapping[str, StageConfig]) -> str | None:
    if is_base(slot) or is_external(slot):
        fits = POLICY in slot.takes or slot.ref.startswith("path:") or (slot.external and slot.ref.startswith("hub:"))
        return None if fits else f"{slot.ref!r} is a language model; {what_fits(slot, stages)}"
    stage = stage_of(slot)
    if stage is None:
        known = [*(UNTRAINED_ARMS if is_arm(slot) else (BASE,)), *(_STAGE + name for name in stages)]
        close = nearest(slot.ref, known)
        hint = f"did you mean {close!r}? Otherwise " if close else ""
        forms = with_scheme(slot.ref) or "write base, stage:NAME, path:FOLDER or hub:ORG/NAME@REVISION"
        advice = f"write {_STAGE}{slot.ref}" if slot.ref in stages else f"{hint}{forms}"
        return f"{slot.ref!r} is not a reference; {advice}"
    if stage not in stages:
        nearby = suggestion(stage, stages)
        otherwise = " Otherwise remove this arm." if is_arm(slot) else " Otherwise write null." if slot.optional else ""
        return f"no stage '{stage}' in this run; {nearby}{'' if nearby.endswith('?') else '.'}{otherwise}"
    produced = kind_of(stages[stage]).produces
    if produced not in slot.takes:
        noun = _NOUNS.get(produced, f"an artifact of kind {produced!r}")
        return f"{slot.ref!r} is {noun}; {what_fits(slot, stages)}"
    return None


def what_fits(slot: Slot, stages: Mapping[str, StageConfig]) -> str:
    """``this slot takes a reward model. Use 'stage:reward'.``"""
    wanted = " or ".join(_NOUNS.get(kind, f"an artifact of kind {kind!r}") for kind in slot.takes)
    fitting = [name for name, stage in stages.items() if kind_of(stage).produces in slot.takes]
    advice = "No stage of this run makes one."
    if fitting:
        advice = f"Use {' or '.join(repr(_STAGE + name) for name in fitting)}."
    elif slot.external:
        advice += " A model from elsewhere, by path: or hub:, must be a …ForSequenceClassification with one label."
    return f"this slot takes {wanted}. {advice}"


def _cycle(stages: Mapping[str, StageConfig]) -> list[str]:
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in finished:
            for other in inputs_of(name, stages):
                if other in stages and (cycle := visit(other, [*trail, name])):
                    return cycle
            finished.add(name)
        return []

    for name in stages:
        if cycle := visit(name, []):
            return cycle
    return []


def of_stage(
    run: RunConfig,
    name: str,
    *,
    base: ModelSource,
    data: dict[str, str],
    inputs: dict[str, str],
    arms: dict[str, str],
    files: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """The identity of a stage. ``data`` maps each data field to the identity of its content, ``inputs`` and ``arms``
    each slot to a fingerprint, ``files`` other fields to files. The stage's name is part of it because random numbers
    are derived from it. Paths, launch, tracking, and how often a stage logs or saves are not."""
    stage = run.stages[name]
    kind = kind_of(stage)
    others = {field: content for field, content in data.items() if field != "data"}
    optional = {
        "extra_data": others,
        "code": scorer_checks.code(stage),
        "files": {
            **kind.files.content(stage, f"stages.{name}"),
            **{field: file_sha256(path) for field, path in (files or {}).items()},
        },
    }  # left out if empty, as in results that are older than these keys
    described_base: dict[str, Any] = {"content": base.identity, "dtype": run.model.dtype.value}
    if run.model.chat_template is not None:
        described_base["chat_template"] = digest(template_text(run.model.chat_template))
    if run.model.template_options:
        described_base["template_options"] = canonical(run.model.template_options)
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": kind.revision,
        "rule": None,  # older results hold a hash here if a rule of the package scored
        "config": canonical(scorer_checks.without_paths(kind.as_read(stage))),
        "data": data.get("data"),
        "inputs": inputs,
        "arms": arms,
        "base": described_base,
        "seed": run.seed,
        **{key: value for key, value in optional.items() if value},
    }


def of_report(run: RunConfig, name: str, *, inputs: dict[str, str]) -> dict[str, Any]:
    """A report shows the whole run, so ``inputs`` holds every other stage's fingerprint, which lacks its gates."""
    stage = run.stages[name]
    kind = kind_of(stage)
    gates = {other: canonical(gates_of(config)) for other, config in run.stages.items()}
    gated = {other: requirements for other, requirements in gates.items() if requirements}
    optional = {"gates": gated, "shown": _shown(run, stage)}  # left out if empty, as in reports of before these keys
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": kind.revision,
        "config": canonical(stage),
        "inputs": inputs,
        "run": {"name": run.name, "summary": run.summary},
        **{key: value for key, value in optional.items() if value},
    }


def _shown(run: RunConfig, report: StageConfig) -> dict[str, Any]:
    """The references in the slots of a report; empty for a report on the only evaluation of its run."""
    shown = {slot.field: slot.ref for slot in slots(report)}
    evaluations = [f"stage:{name}" for name, config in run.stages.items() if kind_of(config).produces == EVALUATION]
    return {} if list(shown.values()) == evaluations else shown or {"evaluation": "nothing"}
