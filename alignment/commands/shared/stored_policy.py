"""A policy as the driver hands it to a process that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.model import TemplateChoice


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

    @property
    def sources(self) -> tuple[Path | None, Path | None, TemplateChoice]:
        """Its artifact, its base, and the choice of the base's chat template."""
        artifact, base = (Path(folder) if folder else None for folder in (self.artifact, self.base))
        return artifact, base, TemplateChoice(source=self.chat_template, options=self.template_options)
