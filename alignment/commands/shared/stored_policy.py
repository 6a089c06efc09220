"""A policy as the driver hands it to a process that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPolicy:
    """A policy on this disk: an ``artifact`` on its ``base`` (None if it has weights of its own), or the bare base.

    ``name`` is how the user calls it, ``described`` says what it is, and ``dtype`` is that of its weights.
    ``chat_template`` replaces the one of a bare base, and ``template_options`` are its options. A result's tokenizer
    has both.
    """

    name: str
    described: str
    artifact: str | None
    base: str | None
    dtype: str
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
