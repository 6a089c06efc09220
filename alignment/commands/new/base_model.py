"""What a new recipe has to know of the base model, read without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from alignment.config.model import AdapterKind, Dtype, ModelConfig
from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Question, Reasoned
from alignment.core import hardware
from alignment.core.artifacts import POLICY
from alignment.core.errors import ConfigError
from alignment.core.model_files import formats_of_weights, positions_in, weights_size
from alignment.costs.devices import DEVICES
from alignment.data.templates import own_template
from alignment.pipeline.sources import model_sources
from alignment.stages.base import LearnsFrom
from alignment.stages.registry import kinds

_CHATML = "chatml"
"""What ``model.chat_template`` takes for the template that most models use."""
_UNLIMITED = 1 << 20
_WIDE, _HALF_WIDE, _IN_FOUR_BITS = 4.0, 2.0, 0.6
"""Bytes of a frozen weight in float32, in 16 bits, and in four bits with its scales."""
_HALF, _FIXED = 1.5, 2e9
"""The memory that an adapter's training is assumed to take: half as much again as the frozen weights, and 2 GB."""
_FULL_BYTES = 16
"""float32 weights, gradients and two moments of each weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """``folder`` holds at least its configuration and tokenizer; ``weights`` is None if they are not on this machine.
    ``positions`` is the longest sequence that it reads."""

    source: str
    folder: Path
    positions: int
    has_template: bool
    weights: int | None

    @property
    def template(self) -> str | None:
        """The chat template to set, if it has none."""
        return None if self.has_template else _CHATML


def base_model(source: str | None, *, announce: Callable[[str], None]) -> BaseModel:
    """The model of a source, or the default one. Of a hub's model the configuration and the tokenizer are downloaded.
    Raises ModelError: there is no such model, a folder has no weights, or it cannot be fetched."""
    chosen = source or ModelConfig().source
    scheme, _, rest = chosen.partition(":")
    if scheme == "path" and rest:  # nobody downloads its weights later, so the recipe could not be planned
        model_sources.model_folder(rest, where="--model")
    model = model_sources.resolve_shapes(chosen, where="--model")
    if not model.ready:
        model = model_sources.fetch(model, announce=announce)
    assert model.folder is not None, "a model that is ready has a folder"
    return BaseModel(
        source=chosen,
        folder=model.folder,
        positions=_UNLIMITED if (positions := positions_in(model.folder)) is None else positions,
        has_template=own_template(model.folder) is not None,
        weights=_number_of_weights(model.folder),
    )


def _number_of_weights(folder: Path) -> int | None:
    size = weights_size(folder)
    wide = formats_of_weights(folder) == {"F32"}
    return size // (4 if wide else 2) if size else None


def free_bytes(device: str | None) -> tuple[float, str]:
    """The memory to train in, and its name. Raises ConfigError."""
    names = ", ".join(DEVICES)
    if device is None and hardware.count_devices():
        raise ConfigError("what GPU does this machine have?", where="--device", remedy=f"one of {names}")
    if device is None:
        return hardware.free_memory(), "free on this machine"
    if device not in DEVICES:
        raise ConfigError(f"no device {device!r}", where="--device", remedy=f"one of {names}")
    return DEVICES[device].memory, f"of a {device}"


def adapter_for(model: BaseModel, memory: tuple[float, str], dtype: Reasoned | None) -> Reasoned:
    """LoRA, or QLoRA where the weights leave too little memory: in 16 bits, or in the ``dtype`` of ``dtype_for``."""
    free, whose = memory
    if model.weights is None:
        why = "the weights are not downloaded yet; align plan --cost shows what fits"
        return Reasoned(value=AdapterKind.lora.value, why=why)
    sizes = {AdapterKind.lora: _HALF_WIDE if dtype is None else _WIDE, AdapterKind.qlora: _IN_FOUR_BITS}
    needs = {kind: _HALF * size * model.weights + _FIXED for kind, size in sizes.items()}
    kind = AdapterKind.lora if needs[AdapterKind.lora] <= free else AdapterKind.qlora
    why = (
        f"{model.weights / 1e6:,.0f} million weights take about {needs[kind] / 1e9:.1f} GB with {kind.value} and "
        f"{(_FULL_BYTES * model.weights + _FIXED) / 1e9:.1f} GB when all are trained; {free / 1e9:.1f} GB are {whose}"
    )
    if needs[kind] > free:
        why += "; even that is not enough"
    return Reasoned(value=kind.value, why=f"{why} (a rule of thumb; align plan --cost computes it)")


def dtype_for(device: str | None) -> Reasoned | None:
    """float32 where a processor would be slow in bfloat16; else the default."""
    if device is not None or hardware.count_devices() or hardware.has_bfloat16():
        return None
    return Reasoned(value=Dtype.float32.value, why="this processor has no bfloat16 instructions")


def questions(circumstances: Circumstances) -> list[Question]:
    """What the kinds have to know from the user, each question once."""
    raised = (question for kind in kinds().values() for question in kind.proposals.questions(circumstances))
    return list({question.name: question for question in raised}.values())


def proposed_stages(circumstances: Circumstances) -> dict[str, NewStage]:
    """The stages of the recipe, by the names of their kinds. Raises ConfigError."""
    stages: dict[str, NewStage] = {}
    for kind in kinds().values():
        stage = kind.proposals.stage(circumstances)
        if stage is not None:
            stages[kind.name] = stage
            made = {name: list(earlier) for name, earlier in circumstances.made.items()}
            made.setdefault(kind.produces, []).append(kind.name)
            begins = kind.produces == POLICY and kind.learning.learns_from in (None, LearnsFrom.demonstrations)
            start = f"stage:{kind.name}" if begins else circumstances.start
            circumstances = replace(circumstances, made=made, start=start)
    scorer = circumstances.answer(SCORER)
    if scorer and not any(scorer in repr(stage.settings) for stage in stages.values()):
        message = f"{scorer!r} has no effect: no stage scores answers"
        raise ConfigError(message, where=f"--{SCORER.name}", remedy="leave it out")
    read = [id(stage.reads) for stage in stages.values()]
    for rows in circumstances.rows.values():
        if id(rows) not in read:
            remedy = "leave it out, choose stages that use it (--from-pairs, --scorer), or name it with --heldout"
            raise ConfigError("no stage uses it", where=", ".join(rows.files), remedy=remedy)
    return stages
