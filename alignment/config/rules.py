"""Which values are allowed, beyond their type. A field's type names its rule: ``lr: Annotated[float, POSITIVE]``."""

from __future__ import annotations

import math
import operator
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_URL = re.compile(r"(https?://[^\s/@?#]+(/[^\s@?#]*)?)?")


def is_name(value: str) -> bool:
    """Whether ``value`` may name a run or a stage: it becomes a folder's name and a word in commands."""
    return _NAME.fullmatch(value) is not None


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
    JSON Schema, as far as it can, for editors."""

    holds: Callable[[Any], bool]
    allowed: str
    secret: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)


LARGEST = 1e6
"""The largest absolute value of a score and of its factors. At this size float32 distinguishes scores that are .06
apart, and can hold the squared errors of a value function, summed over any batch. Beyond it a loss would become
infinite."""


def _number(allowed: str, **keywords: float) -> Rule:
    """The rule of a finite number within the limits that JSON Schema's ``keywords`` set."""
    limits = {
        "minimum": operator.ge,
        "exclusiveMinimum": operator.gt,
        "maximum": operator.le,
        "exclusiveMaximum": operator.lt,
    }

    def holds(value: Any) -> bool:
        return math.isfinite(value) and all(limits[name](value, limit) for name, limit in keywords.items())

    return Rule(holds, allowed, keywords=keywords)


def _text(pattern: str | re.Pattern[str], allowed: str, *, secret: bool = False) -> Rule:
    form = re.compile(pattern, re.ASCII) if isinstance(pattern, str) else pattern
    keywords = {"pattern": f"^{form.pattern}$"}
    return Rule(lambda value: form.fullmatch(value) is not None, allowed, secret=secret, keywords=keywords)


NAME = _text(_NAME, "1 to 64 of A-Z a-z 0-9 . _ -, beginning with a letter, a digit or _")
FILLED = Rule(bool, "at least one entry", keywords={"minLength": 1, "minItems": 1, "minProperties": 1})
POSITIVE = _number("a number above 0", exclusiveMinimum=0)
NOT_NEGATIVE = _number("0 or more", minimum=0)
AT_LEAST_ONE = _number("1 or more", minimum=1)
ZERO_OR_ONE = _number("0 or 1", minimum=0, maximum=1)  # of a whole number
FINITE = _number("a finite number")
SCORE = _number(f"from -{LARGEST:g} to {LARGEST:g}", minimum=-LARGEST, maximum=LARGEST)
PENALTY = _number(f"from 0 to {LARGEST:g}", minimum=0, maximum=LARGEST)
FRACTION = _number("from 0 to 1", minimum=0, maximum=1)
PART = _number("above 0 and at most 1", exclusiveMinimum=0, maximum=1)
BETWEEN = _number("above 0 and below 1", exclusiveMinimum=0, exclusiveMaximum=1)
BELOW_ONE = _number("from 0 to below 1", minimum=0, exclusiveMaximum=1)
BELOW_HALF = _number("from 0 to below 0.5", minimum=0, exclusiveMaximum=0.5)
PORT = _number("a port from 1 to 65535", minimum=1, maximum=65535)
PATTERN = Rule(_compiles, "a regular expression in Python syntax")
SLURM_WORD = _text(
    r"[A-Za-z0-9_][A-Za-z0-9._,-]{0,127}", "1 to 128 of A-Z a-z 0-9 . _ , -, beginning with a letter, a digit or _"
)
SLURM_TIME = _text(
    r"(\d{1,3}-)?\d{1,4}:[0-5]\d:[0-5]\d", "hours:minutes:seconds as in '4:00:00', after days as in '2-12:00:00'"
)
SLURM_MEMORY = _text(r"[1-9]\d{0,8}[KMGT]", "a whole number with K, M, G or T, as in 64G")
TAGS = Rule(
    lambda value: all(0 < len(tag) <= 64 for tag in value),
    "tags of 1 to 64 characters",
    keywords={"items": {"type": "string", "minLength": 1, "maxLength": 64}},
)
URL = _text(
    _URL,
    "http://HOST:PORT/PATH or https://…, without a key or a password in it (api_key_env names a variable)",
    secret=True,
)
TRACKING_URL = _text(
    _URL,
    "http://HOST:PORT/PATH or https://…, without a user or a password in it (these belong in "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)",
    secret=True,
)
STORE = _text(
    re.compile(r"[a-z][a-z0-9+.-]*://[^\s/@?#:]+(/[^\s/@?#:]+)*/?"),
    "s3://BUCKET/PREFIX, without a key or a password in it: the environment or ~/.aws has them",
    secret=True,
)
VARIABLE = _text(
    r"[A-Z_][A-Z0-9_]{0,63}", "the name of an environment variable, in capitals; never the key itself", secret=True
)


@cache
def rule_of(cls: type, name: str) -> Rule | None:
    """The rule in the annotation of a field, if it has one."""
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    extras = typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()
    return next((extra for extra in extras if isinstance(extra, Rule)), None)
