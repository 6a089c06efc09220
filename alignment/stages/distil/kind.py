"""The stage kind ``distil``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignment.config.faults import Fault, unread_faults, unread_notes
from alignment.config.model import CONTINUE, AdapterKind
from alignment.config.run import RunConfig
from alignment.core.artifacts import POLICY
from alignment.data.records import HeldOutPrompt, Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import PROMPTS
from alignment.stages.base import Curve, DataSlot, LaunchShape, Learning, Outcome, Reported, StageKind
from alignment.stages.distil.config import DistilConfig, Method
from alignment.stages.distil.distil_tables import lines, tables
from alignment.stages.shared.kind_answers import (
    check_engine,
    curve,
    held_out_fault,
    replay_advice,
    sampling_faults,
    sampling_refusals,
)

COUNTS = ("rows", "rows_too_long", "prompts", "prompts_evaluated", "prompts_repeated", "answer_tokens")
BEFORE = "_before"
FIGURES = ("eval_acceptance", "eval_same_top", "eval_divergence")
HELD_OUT = (*FIGURES, *(f"{name}{BEFORE}" for name in FIGURES), "eval_tokens_per_step")


def _data(config: DistilConfig) -> list[DataSlot]:
    left_out = [
        DataSlot(field=f"leave_out[{number}]", data=data, record=HeldOutPrompt)
        for number, data in enumerate(config.leave_out)
    ]
    return [DataSlot(field="data", data=config.data, record=Prompt, rows=PROMPTS), *left_out]


def _faults(config: DistilConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    usual = DistilConfig()
    yield from sampling_faults(config.sampling, f"{where}.sampling")
    if config.layers is None and config.init == config.teacher:
        message = (
            f"{config.init!r} is the teacher itself, so there is nothing to learn; set layers to use its first "
            f"layers (stage=draft), or name a smaller model with the same tokenizer"
        )
        yield Fault(where=f"{where}.init", message=message)
    if config.layers is not None and config.adapter.chain is CONTINUE and config.adapter.kind is not AdapterKind.full:
        message = (
            "the first layers are whole weights with all adapters merged, so there is no adapter to continue; use merge"
        )
        yield Fault(where=f"{where}.adapter.chain", message=message)
    if not config.method.needs_teacher:
        yield from unread_faults(config, usual, ("loss_temperature",), where, f"only method '{Method.tokens.value}'")
    if not config.eval_fraction:
        names = ("gamma", "timed_prompts", "bootstrap_samples")
        yield from unread_notes(config, usual, names, where, "only an eval_fraction above 0")
    if config.timed_prompts and config.adapter.kind is AdapterKind.prefix:
        message = f"{config.timed_prompts}, but assisted generation is not timed with a prefix; use 0, or adapter=lora"
        yield Fault(where=f"{where}.timed_prompts", message=message)


def _too_few_prompts(config: DistilConfig, num_prompts: int, where: str) -> Iterator[Fault]:
    yield from held_out_fault(config.eval_fraction, num_prompts, "prompts", where)


def too_many_layers(config: DistilConfig, layers: int, where: str) -> Iterator[Fault]:
    """A fault if a draft of the first layers would have all ``layers`` of its ``init``."""
    if config.layers is not None and config.layers >= layers:
        message = (
            f"{config.layers}, but {config.init} has {layers} layers, and a draft of all of them would be as slow; "
            f"choose at most {layers - 1}"
        )
        yield Fault(where=f"{where}.layers", message=message)


def _reported(config: DistilConfig) -> Reported:
    held_out = HELD_OUT if config.eval_fraction else ()
    counts = (*COUNTS, "eval_prompts", "eval_tokens") if config.eval_fraction else COUNTS
    return Reported(held_out=held_out, training=("loss",), counts=counts, less_is_better=("loss", "eval_divergence"))


def _why_missing(config: DistilConfig, metric: str, stage: str) -> str:
    if config.eval_fraction or not metric.startswith("eval_"):
        return ""
    return f"stage {stage!r} reports no {metric!r} without held-out prompts; set stages.{stage}.eval_fraction above 0"


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    before, after = metrics.get("eval_acceptance_before"), metrics.get("eval_acceptance")
    if before is None or after is None or after > before:
        return []
    return [
        f"drafted tokens are not accepted more often after distillation ({after:.1%}) than before ({before:.1%}); "
        f"train longer, change the learning rate, or add prompts"
    ]


def _curves(settings: Mapping[str, Any]) -> list[Curve]:
    if settings.get("method") == Method.sequence.value:
        return [
            curve("Loss", "nats per token", "loss"),
            curve("Next-token accuracy", "share", "mean_token_accuracy"),
        ]
    return [
        curve("Divergence from the teacher", "nats per token", "loss"),
        curve("Acceptance", "of drafted tokens, at the temperature of the loss", "acceptance"),
        curve("Same most likely token", "share", "same_top"),
    ]


KIND = StageKind(
    name="distil",
    summary="a smaller student of a policy, such as a draft for speculative decoding (stage=draft)",
    config=DistilConfig,
    revision=10,
    produces=POLICY,
    run="alignment.stages.distil.run:run",
    data=_data,
    leaves_out="leave_out",
    faults=_faults,
    curves=_curves,
    launch=LaunchShape(
        refusals=lambda config, launch: sampling_refusals(config.sampling, launch),
        check_machine=lambda config, where: check_engine(config.sampling, where),
    ),
    learning=Learning(
        limits=lambda config: Limits(row=config.max_prompt_length, too_long=config.too_long),
        faults=_too_few_prompts,
        one_row_a_record=lambda _: False,
        batches_of_rows=False,
        layer_faults=too_many_layers,
        layers_left=lambda config, layers: layers if config.layers is None else config.layers,
    ),
    outcome=Outcome(
        metrics=_reported,
        why_missing=_why_missing,
        doubts=_doubts,
        lines=lines,
        tables=tables,
        against_forgetting=replay_advice,
    ),
)
