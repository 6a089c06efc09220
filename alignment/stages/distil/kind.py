"""The stage kind ``distil``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.faults import Fault, refuse, unread_faults, unread_notes
from alignment.config.launch import SamplingConfig
from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind
from alignment.config.optim import OptimConfig
from alignment.config.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE
from alignment.config.run import RunConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY
from alignment.data.tokens.row_kinds import PROMPTS
from alignment.records.interval import Interval
from alignment.records.stages import DISTILLATION_FILE, Assisted, Distillation, StudentFigures, Timing
from alignment.stages import base
from alignment.stages.shared import kind_answers as parts


class Method(str, Enum):
    """What the student learns from the teacher's answers.

    ``tokens``: the teacher's whole distribution at each token, with the forward divergence (Hinton et al. 2015, section
    2). ``sequence``: the answers themselves (sequence-level distillation, Kim and Rush 2016, section 3.2)."""

    tokens = "tokens"
    sequence = "sequence"

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is asked while the student trains."""
        return self is Method.tokens


@dataclass(kw_only=True, slots=True)
class DistilConfig:
    """A student learns the answers that a ``teacher`` samples to the prompts of ``data``.

    The student is the policy ``init``. With ``layers`` it is a model made of the first decoder layers of ``init``, with
    its embeddings, last norm and head: a draft for speculative decoding. Its weights are those of ``init`` with all
    adapters merged. Student and teacher share a tokenizer.

    The teacher samples ``completions_per_prompt`` answers at ``temperature``, ``batch_size`` at a time, and
    ``sampling`` says how. The loss of ``tokens`` divides the logits of both by ``loss_temperature``; the reported
    figures divide them by ``temperature``. Each prompt is asked once, unless it overlaps with the prompts of
    ``leave_out``. An empty ``leave_out`` stands for the data of the run's evaluations.

    ``eval_fraction`` of the prompts is held out. On the teacher's answers to these, the student is compared with the
    teacher before and after training: how often would speculative decoding with ``gamma`` drafted tokens per step
    accept a token (Leviathan et al. 2023)? Greedy answers to ``timed_prompts`` of them are generated with and without
    the draft."""

    kind: str = "distil"
    init: str = reference_to("base", "policy")
    layers: Annotated[int | None, POSITIVE] = None
    teacher: str = reference_to("stage:sft", "policy")
    method: Method = Method.tokens
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    leave_out: list[DataConfig] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    loss_temperature: Annotated[float, POSITIVE] = 1.0
    completions_per_prompt: Annotated[int, POSITIVE] = 1
    temperature: Annotated[float, POSITIVE] = 1.0
    max_prompt_length: Annotated[int, POSITIVE] = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    batch_size: Annotated[int, POSITIVE] = not_identity(128)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval_fraction: Annotated[float, BELOW_ONE] = 0.1
    gamma: Annotated[int, POSITIVE] = 4
    timed_prompts: Annotated[int, NOT_NEGATIVE] = 0
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


def lines(artifact: Path) -> list[str]:
    """The acceptance before and after, and the measured time; nothing without held-out prompts."""
    if not (artifact / DISTILLATION_FILE).is_file():
        return []
    record = Distillation.read(artifact)
    before, after = record.before.acceptance, record.after.acceptance
    sentences = [
        f"{artifact.name}: acceptance of drafted tokens {_words(before)} before and {_words(after)} after, on "
        f"{record.prompts} held-out prompts"
    ]
    if record.timing is not None:
        timing = record.timing
        sentences.append(
            f"{artifact.name}: greedy answers are made {timing.speed_up(timing.before):.2f} times as fast with the "
            f"draft before training and {timing.speed_up(timing.after):.2f} times as fast after it; "
            f"{_differing(timing)}"
        )
    return sentences


def _differing(timing: Timing) -> str:
    number = timing.before.differing + timing.after.differing
    if not number:
        return f"all {timing.prompts} answers are the same as without a draft"
    gap = max(timing.before.widest_gap, timing.after.widest_gap)
    return (
        f"{number} of {2 * timing.prompts} answers differ from those without a draft, first at a token where the "
        f"logits differ by at most {gap:.2g}"
    )


def tables(artifact: Path) -> list[base.ResultTable]:
    """The student before and after it learned."""
    record = Distillation.read(artifact)
    timing = record.timing
    columns = {
        "acceptance": f"acceptance at temperature {record.temperature:g}",
        "tokens": f"expected tokens per step, {record.gamma} drafted",
        "same": "same most likely token",
        "divergence": "divergence, nats per token",
    }
    if timing is not None:
        columns |= {
            "sampling": "expected speed-up, sampling",
            "greedy": "expected speed-up, greedy",
            "measured": "measured speed-up, greedy",
        }
    rows = [
        ("before", _cells(record.before, timing, None if timing is None else timing.before)),
        ("after", _cells(record.after, timing, None if timing is None else timing.after)),
    ]
    return [base.ResultTable(title="Compared with its teacher", note=_note(record), columns=columns, rows=rows)]


def _cells(figures: StudentFigures, timing: Timing | None, assisted: Assisted | None) -> list[base.Cell]:
    intervals = [figures.acceptance, figures.tokens_per_step, figures.same_top, figures.divergence]
    if timing is None or assisted is None:
        return [_cell(interval) for interval in intervals]
    intervals += [assisted.expected_sampling, assisted.expected]
    return [*(_cell(interval) for interval in intervals), base.Cell(text=f"{timing.speed_up(assisted):.2f}")]


def _note(record: Distillation) -> str:
    note = (
        f"{_student(record)} on {record.tokens} tokens of the teacher's answers to {record.prompts} held-out prompts. "
        "Acceptance is the mean of Σ min(p, q), the probability that speculative sampling keeps a drafted token "
        "(Leviathan et al. 2023). 95 % intervals over prompts."
    )
    if record.timing is None:
        return note
    return (
        f"{note} A token of the draft takes {record.timing.cost_ratio:.2f} of the teacher's time. Greedy answers, one "
        f"at a time, by transformers: {_differing(record.timing)}."
    )


def _student(record: Distillation) -> str:
    if record.layers is None:
        return "The student"
    return f"The student, the first {'layer' if record.layers == 1 else f'{record.layers} layers'},"


def _cell(interval: Interval) -> base.Cell:
    bounds = "" if interval.bounds is None else f"{interval.bounds[0]:.3f} to {interval.bounds[1]:.3f}"
    return base.Cell(text=f"{interval.mean:.3f}", bounds=bounds)


def _words(interval: Interval) -> str:
    if interval.bounds is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ({interval.bounds[0]:.3f} to {interval.bounds[1]:.3f})"


COUNTS = ("rows", "rows_too_long", "prompts", "prompts_evaluated", "prompts_repeated", "answer_tokens")
BEFORE = "_before"
FIGURES = ("eval_acceptance", "eval_same_top", "eval_divergence")
HELD_OUT = (*FIGURES, *(f"{name}{BEFORE}" for name in FIGURES), "eval_tokens_per_step")


def _faults(config: DistilConfig, _: RunConfig, where: str) -> Iterator[Fault]:
    usual = DistilConfig()
    yield from parts.sampling_faults(config.sampling, f"{where}.sampling")
    if config.layers is None and config.init == config.teacher:
        message = (
            f"{config.init!r} is the teacher itself, so there is nothing to learn; set layers to use its first "
            f"layers (stage=draft), or name a smaller model with the same tokenizer"
        )
        yield Fault(where=f"{where}.init", message=message)
    if config.layers is not None and config.adapter.chain is CONTINUE and config.adapter.kind is not AdapterKind.full:
        message = "the first layers are whole weights with all adapters merged, so there is none to continue; use merge"
        yield Fault(where=f"{where}.adapter.chain", message=message)
    if not config.method.needs_teacher:
        yield from unread_faults(config, usual, ("loss_temperature",), where, f"only method '{Method.tokens.value}'")
    if not config.eval_fraction:
        names = ("gamma", "timed_prompts", "bootstrap_samples")
        yield from unread_notes(config, usual, names, where, "only an eval_fraction above 0")
    if config.timed_prompts and config.adapter.kind is AdapterKind.prefix:
        message = f"{config.timed_prompts}, but assisted generation is not timed with a prefix; use 0, or adapter=lora"
        yield Fault(where=f"{where}.timed_prompts", message=message)


def layers_left(config: DistilConfig, layers: int, where: str) -> int:
    """The layers of the student. Raises ConfigError: a draft would have all ``layers`` of its ``init``."""
    if config.layers is not None and config.layers >= layers:
        message = (
            f"{config.layers}, but {config.init} has {layers} layers; choose at most {layers - 1} for a faster draft"
        )
        refuse([Fault(where=f"{where}.layers", message=message)])
    return layers if config.layers is None else config.layers


def _reported(config: DistilConfig) -> base.Reported:
    less = ("loss", "eval_divergence")
    if not config.eval_fraction:
        absent = {"eval_": ("held-out prompts", "eval_fraction above 0")}
        return base.Reported(training=("loss",), counts=COUNTS, less_is_better=less, absent=absent)
    counts = (*COUNTS, "eval_prompts", "eval_tokens")
    return base.Reported(held_out=HELD_OUT, training=("loss",), counts=counts, less_is_better=less)


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    before, after = metrics.get("eval_acceptance_before"), metrics.get("eval_acceptance")
    if before is None or after is None or after > before:
        return []
    return [
        f"drafted tokens are not accepted more often after distillation ({after:.1%}) than before ({before:.1%}); "
        f"train longer, change the learning rate, or add prompts"
    ]


def _curves(settings: Mapping[str, Any]) -> list[base.Curve]:
    if settings.get("method") == Method.sequence.value:
        return [
            parts.curve("Loss", "nats per token", "loss"),
            parts.curve("Next-token accuracy", "share", "mean_token_accuracy"),
        ]
    return [
        parts.curve("Divergence from the teacher", "nats per token", "loss"),
        parts.curve("Acceptance", "of drafted tokens, at the temperature of the loss", "acceptance"),
        parts.curve("Same most likely token", "share", "same_top"),
    ]


KIND = base.StageKind(
    name="distil",
    summary="a smaller student of a policy, such as a draft for speculative decoding (stage=draft)",
    config=DistilConfig,
    revision=10,
    produces=POLICY,
    run="alignment.stages.distil.run:run",
    data=lambda config: parts.asked_slots(config, PROMPTS, counted=False),
    faults=_faults,
    metrics=_reported,
    launch=parts.sampled_launch(base.RunsOn.processes),
    learning=base.Learning(
        limits=parts.prompt_limits,
        faults=lambda config, prompts, _, where: parts.held_out_fault(config.eval_fraction, prompts, "prompts", where),
        layers=layers_left,
    ),
    display=base.Display(
        curves=_curves, doubts=_doubts, lines=lines, tables=tables, against_forgetting=parts.replay_advice
    ),
)
