"""The settings that a search of rivals tries. Standard library only: every environment imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.setting import (
    AUTOCAST,
    PPO_MICRO_BATCH,
    PROMPTS,
    ROWS,
    STATIC_COMPILED,
    WITHOUT_AUTOCAST,
    WITHOUT_INPUT_CASTS,
)

Value = bool | int | str
Setting = Mapping[str, Value]
"""The value of each axis of a grid, by the axis's name."""
FASTEST, LEANEST = "fastest", "leanest"
GOALS = (FASTEST, LEANEST)
"""Most tokens a second (fewest seconds an update), and the lowest peak memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One choice that a library offers.

    ``values`` gives each value's words in a table. A search begins with the first. ``needs_compiler`` are the values
    that compile code, and ``goals`` says for which of the two goals other values are tried. ``joined`` axes are tried
    in all combinations with the axis before them, because the best value of one depends on the other.
    """

    name: str
    values: Mapping[Value, str]
    needs_compiler: tuple[Value, ...] = ()
    goals: tuple[str, ...] = GOALS
    joined: bool = False


def groups_of(axes: Sequence[Axis]) -> list[tuple[Axis, ...]]:
    """The axes in their order, each with those that are joined to it."""
    groups: list[tuple[Axis, ...]] = []
    for axis in axes:
        if axis.joined:
            groups[-1] = (*groups[-1], axis)
        else:
            groups.append((axis,))
    return groups


def start_of(axes: Sequence[Axis]) -> dict[str, Value]:
    """The first value of each axis."""
    return {axis.name: next(iter(axis.values)) for axis in axes}


def described(setting: Setting, axes: Sequence[Axis]) -> str:
    """The setting in words."""
    words = [axis.values[setting[axis.name]] for axis in axes if axis.name in setting]
    return ", ".join(word for word in words if word)


def declared(axes: Sequence[Axis]) -> dict[str, list[Value]]:
    """The values of each axis, as a result file lists them."""
    return {axis.name: list(axis.values) for axis in axes}


def compiles(setting: Setting, axes: Sequence[Axis]) -> bool:
    """Whether the setting needs a C++ compiler."""
    return any(setting[axis.name] in axis.needs_compiler for axis in axes)


def micro_rows_of(setting: Setting) -> int:
    """Rows (or pairs) of a micro-batch."""
    return int(setting["micro_rows"])


# ---- axes --------------------------------------------------------------------------------------------------------


def _micro_rows(step: int, *counts: int) -> Axis:
    return Axis(name="micro_rows", values={rows: _parts(step // rows, "micro-batch", rows) for rows in counts})


def _parts(number: int, noun: str, size: int) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es'} of {size}"


def _checkpointing(*, starts: bool) -> Axis:
    words = {True: "gradient checkpointing", False: "no gradient checkpointing"}
    return Axis(name="checkpointing", values={value: words[value] for value in (starts, not starts)})


_PADDING_FREE = Axis(name="padding_free", values={False: "padded", True: "padding-free"}, joined=True)
_PRECISION = {
    AUTOCAST: "bf16 autocast, PEFT's input casts",
    WITHOUT_INPUT_CASTS: "bf16 autocast, no input casts (peft.helpers.disable_input_dtype_casting)",
    WITHOUT_AUTOCAST: "no autocast over the bf16 base, PEFT's input casts",
}
_ATTENTION = Axis(name="attention", values={"sdpa": "sdpa attention", "eager": "eager attention"})
LAUNCHER_MEMORY = Axis(
    name="launcher_memory",
    values={True: "our launcher's settings of glibc's memory", False: "glibc's own settings of memory"},
)
_COMPILED = Axis(name="compiled", values={False: "", True: "torch.compile"}, needs_compiler=(True,), goals=(FASTEST,))
_LAYERS_COMPILED = Axis(
    name="layers_compiled",
    values={False: "", True: "each layer compiled by torch.compile"},
    needs_compiler=(True,),
    goals=(FASTEST,),
)
_CACHE = Axis(name="cache", values={"dynamic": "dynamic cache", "static": "static cache"})


def _precision(*values: str) -> Axis:
    return Axis(name="precision", values={value: _PRECISION[value] for value in values})


def training_axes(kind: str, adapter: str, *, checkpointing: bool) -> tuple[Axis, ...]:
    """The axes of a trainer or a plain loop for ``kind`` (sft, reward, dpo or kto).

    ``checkpointing`` says whether the search starts with it. Trained weights stay in float32 under autocast, as ours
    do, so only a frozen base can go without: not in full training, nor where a new head is trained (reward).
    """
    precision = [AUTOCAST, WITHOUT_INPUT_CASTS, *([] if kind == "reward" else [WITHOUT_AUTOCAST])]
    return (
        _micro_rows(ROWS, 8, 4, 2, 1),
        *((_PADDING_FREE,) if kind == "sft" else ()),
        _checkpointing(starts=checkpointing),
        *((_precision(*precision),) if adapter == "lora" else ()),
        _ATTENTION,
        LAUNCHER_MEMORY,
        _LAYERS_COMPILED,
    )


def grpo_axes() -> tuple[Axis, ...]:
    """The axes of TRL's GRPO trainer, which samples outside of autocast: PEFT's input casts have to stay."""
    return (
        _micro_rows(PROMPTS, PPO_MICRO_BATCH, 32, 4, 1),
        _checkpointing(starts=True),
        _precision(AUTOCAST, WITHOUT_AUTOCAST),
        _CACHE,
        _ATTENTION,
        LAUNCHER_MEMORY,
        _COMPILED,
    )


def ppo_axes() -> tuple[Axis, ...]:
    """The axes of TRL 1.12's PPO. ``rollout_rows`` answers are sampled and scored at once.

    Its trainer neither compiles nor uses autocast, whatever ``bf16`` says. It does not turn checkpointing on by itself;
    the contestant turns it on in both models.
    """
    return (
        _micro_rows(PROMPTS, PPO_MICRO_BATCH, 32, 4, 2),
        _checkpointing(starts=False),
        Axis(name="rollout_rows", values={PROMPTS: "all answers sampled at once", 8: "8 answers sampled at once"}),
        _ATTENTION,
        LAUNCHER_MEMORY,
    )


def sampling_axes(prompts: int, *, common: bool) -> tuple[Axis, ...]:
    """The axes of ``model.generate`` for ``prompts`` prompts.

    With a ``common`` beginning the cache is a copy of one that has read it, which a static cache cannot be.
    """
    counts = [count for count in (128, 64, 32, 16, 8) if count <= prompts]
    cache = Axis(
        name="cache",
        values={**_CACHE.values, STATIC_COMPILED: "static cache, compiled decoding"},
        needs_compiler=(STATIC_COMPILED,),
    )
    return (
        Axis(name="batch", values={count: _parts(prompts // count, "batch", count) for count in counts}),
        *(() if common else (cache,)),
        _ATTENTION,
        LAUNCHER_MEMORY,
    )
