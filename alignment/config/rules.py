"""Which values are allowed, beyond their type. A field's type names its rule: ``lr: Annotated[float, POSITIVE]``."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_SLURM_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._,-]{0,127}")
_SLURM_TIME = re.compile(r"(\d{1,3}-)?\d{1,4}:[0-5]\d:[0-5]\d", re.ASCII)
_SLURM_MEMORY = re.compile(r"[1-9]\d{0,8}[KMGT]", re.ASCII)
_URL = re.compile(r"(https?://[^\s/@?#]+(/[^\s@?#]*)?)?")
_STORE = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/@?#:]+(/[^\s/@?#:]+)*/?")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")


def is_name(value: str) -> bool:
    """Whether ``value`` may name a run or a stage: it becomes a folder's name and a word in commands."""
    return _NAME.fullmatch(value) is not None


def is_url(value: str) -> bool:
    """Whether ``value`` is empty or the address of a server, without a user, a password or a key in it."""
    return _URL.fullmatch(value) is not None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """A test of a value that already has the right type, and a description of the allowed values.

    A wrong value of a ``secret`` rule may hold a key or a password, so it is not shown. ``keywords`` say the same in
    JSON Schema, as far as it can, for editors.
    """

    holds: Callable[[Any], bool]
    allowed: str
    secret: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)


LARGEST = 1e6
"""The largest absolute value of a score and of its factors. At this size float32 distinguishes scores that are .06
apart, and can hold the squared errors of a value function, summed over any batch. Beyond it a loss would become
infinite."""

NAME = Rule(
    is_name,
    "1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter, a digit or _",
    keywords={"pattern": f"^{_NAME.pattern}$"},
)
FILLED = Rule(
    lambda value: bool(value), "at least one entry", keywords={"minLength": 1, "minItems": 1, "minProperties": 1}
)
POSITIVE = Rule(lambda value: value > 0 and math.isfinite(value), "a number above 0", keywords={"exclusiveMinimum": 0})
NOT_NEGATIVE = Rule(lambda value: value >= 0 and math.isfinite(value), "0 or more", keywords={"minimum": 0})
AT_LEAST_ONE = Rule(lambda value: value >= 1 and math.isfinite(value), "1 or more", keywords={"minimum": 1})
ZERO_OR_ONE = Rule(lambda value: value in (0, 1), "0 or 1", keywords={"minimum": 0, "maximum": 1})
FINITE = Rule(lambda value: math.isfinite(value), "a finite number")
SCORE = Rule(
    lambda value: abs(value) <= LARGEST,
    f"from -{LARGEST:g} to {LARGEST:g}",
    keywords={"minimum": -LARGEST, "maximum": LARGEST},
)
PENALTY = Rule(
    lambda value: 0 <= value <= LARGEST, f"from 0 to {LARGEST:g}", keywords={"minimum": 0, "maximum": LARGEST}
)
FRACTION = Rule(lambda value: 0 <= value <= 1, "from 0 to 1", keywords={"minimum": 0, "maximum": 1})
PATTERN = Rule(lambda value: _compiles(value), "a regular expression in Python syntax")
BETWEEN = Rule(
    lambda value: 0 < value < 1, "above 0 and below 1", keywords={"exclusiveMinimum": 0, "exclusiveMaximum": 1}
)
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "from 0 to below 1", keywords={"minimum": 0, "exclusiveMaximum": 1})
BELOW_HALF = Rule(
    lambda value: 0 <= value < 0.5, "from 0 to below 0.5", keywords={"minimum": 0, "exclusiveMaximum": 0.5}
)
PORT = Rule(lambda value: 0 < value < 65536, "a port from 1 to 65535", keywords={"minimum": 1, "maximum": 65535})
SLURM_WORD = Rule(
    lambda value: _SLURM_WORD.fullmatch(value) is not None,
    "1 to 128 of A-Z a-z 0-9 . _ , -, beginning with a letter, a digit or _",
    keywords={"pattern": f"^{_SLURM_WORD.pattern}$"},
)
SLURM_TIME = Rule(
    lambda value: _SLURM_TIME.fullmatch(value) is not None,
    "hours:minutes:seconds as in '4:00:00', after days as in '2-12:00:00'",
    keywords={"pattern": f"^{_SLURM_TIME.pattern}$"},
)
SLURM_MEMORY = Rule(
    lambda value: _SLURM_MEMORY.fullmatch(value) is not None,
    "a whole number with K, M, G or T, as in 64G",
    keywords={"pattern": f"^{_SLURM_MEMORY.pattern}$"},
)
TAGS = Rule(
    lambda value: all(0 < len(tag) <= 64 for tag in value),
    "tags of 1 to 64 characters",
    keywords={"items": {"type": "string", "minLength": 1, "maxLength": 64}},
)
PART = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1", keywords={"exclusiveMinimum": 0, "maximum": 1})
URL = Rule(
    is_url,
    "http://HOST:PORT/PATH or https://…, without a key or a password in it (api_key_env names a variable)",
    secret=True,
    keywords={"pattern": f"^{_URL.pattern}$"},
)
TRACKING_URL = Rule(
    is_url,
    "http://HOST:PORT/PATH or https://…, without a user or a password in it (these belong in "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)",
    secret=True,
    keywords={"pattern": f"^{_URL.pattern}$"},
)
STORE = Rule(
    lambda value: _STORE.fullmatch(value) is not None,
    "s3://BUCKET/PREFIX, without a key or a password in it: the environment or ~/.aws has them",
    secret=True,
    keywords={"pattern": f"^{_STORE.pattern}$"},
)
VARIABLE = Rule(
    lambda value: _VARIABLE.fullmatch(value) is not None,
    "the name of an environment variable, in capitals; never the key itself",
    secret=True,
    keywords={"pattern": f"^{_VARIABLE.pattern}$"},
)


@cache
def rule_of(cls: type, name: str) -> Rule | None:
    """The rule in the annotation of a field, if it has one."""
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Rule)), None)
