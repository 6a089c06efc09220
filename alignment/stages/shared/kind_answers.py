"""Parts of a ``StageKind`` that several kinds share. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.faults import Fault, unread_notes
from alignment.config.launch import Engine, LaunchConfig, SamplingConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.core.artifacts import REWARD_MODEL, read_manifest
from alignment.data.records import PreferencePair
from alignment.data.tokens.row_kinds import PAIRS, SCORED_PAIRS, Limits
from alignment.data.tokens.row_kinds import Kind as RowKind
from alignment.engines.engine_environment import interpreter
from alignment.evaluation.paired_scores import labels
from alignment.records import training as names
from alignment.rewards.scorer_sources import REWARD, is_reference, source_field
from alignment.stages.base import Curve, DataSlot, Refusal, Reported, Slot

ROW_COUNTS = ("rows", "rows_too_long", "rows_cut")


def curve(
    title: str, unit: str, keys: str | tuple[str, ...], guide: float | None = None, labels: tuple[str, ...] = ("",)
) -> Curve:
    """A chart of one metric, or of several with their labels."""
    return Curve(title=title, unit=unit, keys=(keys,) if isinstance(keys, str) else keys, labels=labels, guide=guide)


def next_token_curves(settings: Mapping[str, Any]) -> list[Curve]:
    """Charts of a stage that learns to predict tokens."""
    charts = [curve("Loss", "nats per token", "loss"), curve("Next-token accuracy", "share", "mean_token_accuracy")]
    return beside_held_out(charts, settings, loss="loss", accuracy="mean_token_accuracy")


def next_token_metrics(config: Any) -> Reported:
    """Metrics of a stage that learns to predict tokens."""
    return and_held_out(Reported(training=("loss",), counts=ROW_COUNTS), config.validation)


def pair_rows(margin: float) -> RowKind:
    """How pairs become rows: with their difference of scores, if a stage weighs it by a ``margin`` above 0."""
    return SCORED_PAIRS if margin else PAIRS


def pair_slot(data: DataConfig, margin: float) -> DataSlot:
    """Pairs to learn from; with a ``margin`` above 0 each needs scores."""
    checks = (PreferencePair.margin,) if margin else ()
    return DataSlot(field="data", data=data, record=PreferencePair, rows=pair_rows(margin), skippable_checks=checks)


def held_out_slot(validation: ValidationConfig, own: DataSlot) -> DataSlot:
    """The validation's own data, whose rows are like those of the stage's ``own``."""
    in_use = validation.on and bool(validation.data.source)
    return replace(own, field="validation.data", data=validation.data, in_use=in_use)


def hold_nearer_to_the_start(name: str) -> str:
    """Advice against forgetting in the stage ``name``, which is held to its start by ``beta``."""
    return (
        f"lower stages.{name}.optim.lr or train fewer epochs; raise stages.{name}.beta, if its loss has this setting; "
        f"add replay only to the SFT stage before it"
    )


def held_out_fault(fraction: float, num_prompts: int, rows: str, where: str) -> Iterator[Fault]:
    """A fault if no prompt can be held out, or none would be left; ``rows`` names what would help."""
    if fraction > 0 and not 0 < round(fraction * num_prompts) < num_prompts:
        message = f"{num_prompts} prompts are too few to hold out a share of {fraction:g}; add {rows}, or use 0"
        yield Fault(where=f"{where}.eval_fraction", message=message)


def and_held_out(reported: Reported, validation: ValidationConfig) -> Reported:
    """The metrics of a stage, and those of its validation if it has one."""
    if not validation.on:
        return reported
    return replace(reported, held_out=(*reported.held_out, *names.HELD_OUT), counts=(*reported.counts, *names.COUNTS))


def why_not_validated(config: Any, metric: str, stage: str) -> str:
    """Why a stage does not report a metric of validation; empty if it does, and for other metrics."""
    if config.validation.on or not metric.startswith(names.PREFIX):
        return ""
    return (
        f"stage {stage!r} reports no {metric!r} without validation; set stages.{stage}.validation.every above 0, and "
        "validation.share or validation.data"
    )


def beside_held_out(charts: list[Curve], settings: Mapping[str, Any], *, loss: str, accuracy: str) -> list[Curve]:
    """The charts, with validation's loss and accuracy beside those of training if the stage was validated."""
    validation = settings.get("validation")
    if not isinstance(validation, Mapping) or not validation.get("every"):
        return charts
    held_out = {loss: names.LOSS, accuracy: names.ACCURACY}
    return [
        replace(chart, keys=(chart.keys[0], held_out[chart.keys[0]]), labels=("training", "held-out"))
        if chart.keys[0] in held_out
        else chart
        for chart in charts
    ]


def handed_on(artifact: Path) -> list[str]:
    """Sentences on the step that validation chose, and on an early end."""
    manifest = read_manifest(artifact)
    if manifest is None:
        return []
    validation = manifest.identity.get("config", {}).get("validation", {})
    sentences = names.outcome(manifest.metrics, patience=validation.get("patience"))
    return [f"{manifest.stage} {sentence}" for sentence in sentences]


class LimitedConfig(Protocol):
    """Settings of a stage that bounds whole rows, their prompts and their answers."""

    max_length: int
    max_prompt_length: int | None
    max_answer_length: int | None
    too_long: TooLongConfig


def limits_of_parts(config: LimitedConfig) -> Limits:
    """Limits of a stage that bounds whole rows, their prompts and their answers."""
    return Limits(
        row=config.max_length,
        prompt=config.max_prompt_length,
        answer=config.max_answer_length,
        too_long=config.too_long,
    )


def of_arms(metrics: tuple[str, ...], arms: list[str]) -> tuple[str, ...]:
    """``metric/label`` for each metric of each arm."""
    return tuple(f"{metric}/{label}" for metric in metrics for label in labels(arms).values())


def replay_advice(name: str) -> str:
    """Advice for stage ``name``, which learns from its own texts, if its policy forgot too much."""
    return (
        f"use replay: stages.{name}.data.mix=[{{source: 'bundled:general/conversations'}}] adds the general rows that "
        f"ship with the package (name the sources that the mix has already, too); these are few, so mix general rows "
        f"of your own into many; or lower stages.{name}.optim.lr, train fewer epochs, or train an adapter"
    )


def sampling_faults(sampling: SamplingConfig, where: str) -> Iterator[Fault]:
    """Settings that have no effect, or contradict each other."""
    names = [field.name for field in fields(SamplingConfig) if field.name != "engine"]
    if sampling.engine is Engine.own:
        yield from unread_notes(sampling, type(sampling)(), names, where, "only engine 'vllm'")
        return
    if sampling.url is not None:
        of_own = ("python", "cache_gb", "gpu_share", "start_timeout")
        yield from unread_notes(sampling, type(sampling)(), of_own, where, "a server that the stage starts (no url)")
    else:
        yield from unread_notes(sampling, type(sampling)(), ("api_key_env",), where, "only a server at a url")


def sampling_refusals(sampling: SamplingConfig, launch: LaunchConfig) -> Iterator[Refusal]:
    """The server listens on one machine."""
    if sampling.engine is Engine.vllm and launch.backend.num_machines > 1:
        why = "the server listens only on one machine"
        yield Refusal(field="sampling.engine", why=why, instead="sampling.engine=own")


def check_engine(sampling: SamplingConfig, where: str) -> None:
    """Checks that this machine has the engine.

    Raises:
        ConfigError: there is no environment with vLLM.
    """
    if sampling.engine is Engine.vllm and sampling.url is None:
        interpreter(sampling.python, package="vllm", where=f"{where}.sampling.python")


def reward_model_slots(scorers: Mapping[str, ScoreSourceConfig]) -> Iterator[Slot]:
    """References for the scorers that are other reward models than the stage's, by the field of each scorer."""
    for field, scorer in scorers.items():
        if is_reference(scorer.source):
            yield Slot(field=source_field(field), takes=(REWARD_MODEL,), ref=scorer.source, external=True)


def missing_reward_faults(scorers: Mapping[str, ScoreSourceConfig], reward: str | None, where: str) -> Iterator[Fault]:
    """Scorers that are the stage's reward model, where it names none."""
    for field, scorer in scorers.items():
        if scorer.source == REWARD and reward is None:
            message = f"'{REWARD}' needs the model in {where}.reward, which is null; name one, or remove this scorer"
            yield Fault(where=f"{where}.{source_field(field)}", message=message)
