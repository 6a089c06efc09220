"""The size of a micro-batch, as a number of tokens or as a search for one."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Annotated, Any

from alignment.config.rules import Rule

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
