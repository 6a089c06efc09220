"""The optimiser and how rows are grouped into its steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any

from alignment.config.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Rule

DEFAULT_TOKENS = 2048


class Automatic(str, Enum):
    """``auto``: the stage tries sizes before its first step and takes one that fits (docs/design/0044)."""

    auto = "auto"


MicroBatchTokens = Annotated[
    int | Automatic,
    Rule(
        lambda value: value is Automatic.auto or value > 0,
        "a whole number above 0, or auto",
        keywords={"exclusiveMinimum": 0},
    ),
]
"""The most tokens of a micro-batch."""


def tokens_of(size: int | Automatic) -> int:
    """The number of tokens, which a stage that runs always has: the worker replaces ``auto`` by the number it chose."""
    assert not isinstance(size, Automatic), "the worker chooses a size before the stage runs"
    return size


def expected_tokens(size: int | Automatic) -> int:
    """The number of tokens, or the default in place of a number that is not chosen yet."""
    return DEFAULT_TOKENS if isinstance(size, Automatic) else size


def is_automatic(config: Any) -> bool:
    """Whether a stage with these settings chooses the size of its micro-batches itself."""
    return isinstance(getattr(getattr(config, "optim", None), "micro_batch_tokens", None), Automatic)


def with_tokens(config: Any, tokens: int) -> Any:
    """The settings of such a stage with a number in place of ``auto``."""
    return replace(config, optim=replace(config.optim, micro_batch_tokens=tokens))


class Schedule(str, Enum):
    """How the learning rate falls after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Moments(str, Enum):
    """How AdamW stores its two moments.

    ``full``: in float32. ``eight_bit``: in eight bits, with a scale for each block of 256 (Dettmers et al. 2022, by
    bitsandbytes), for weights of at least 4,096 numbers. ``paged_eight_bit``: the same, in memory that a GPU pages out
    to the machine's own when it needs room."""

    full = "full"
    eight_bit = "eight_bit"
    paged_eight_bit = "paged_eight_bit"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW. ``batch_size`` is global: it is divided among the processes and does not depend on their number.

    A micro-batch has at most ``micro_batch_tokens`` tokens. Tokens that both rows of a pair share count once, and a row
    that is longer forms its own micro-batch. With ``auto`` the stage chooses a number that fits into memory.
    ``activation_checkpointing`` stores only a layer's input, and computes the layer again in the backward pass. Both
    settings change memory and time, but not what is learned, apart from rounding: without ``master_weights``, and for
    ``modules_to_save``, the gradients of micro-batches are added up in the model's dtype. If ``max_steps`` is set, it
    is the number of steps, and ``epochs`` has no effect."""

    lr: Annotated[float, POSITIVE]
    batch_size: Annotated[int, POSITIVE] = 16
    micro_batch_tokens: MicroBatchTokens = field(default=DEFAULT_TOKENS, metadata={"identity": False})
    activation_checkpointing: bool = field(default=False, metadata={"identity": False})
    epochs: Annotated[float, POSITIVE] = 1.0
    max_steps: Annotated[int | None, POSITIVE] = None
    schedule: Schedule = Schedule.cosine
    warmup_ratio: Annotated[float, BELOW_ONE] = 0.05
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    adam_eps: Annotated[float, POSITIVE] = 1e-8
    moments: Moments = Moments.full
    max_grad_norm: Annotated[float, POSITIVE] = 1.0
