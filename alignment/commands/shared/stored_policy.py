"""A policy as the driver hands it to a process that loads it, and an error as that process hands it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.config.model import TemplateChoice
from alignment.core import errors
from alignment.core.errors import AlignmentError
from alignment.core.files import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPolicy:
    """A policy on this disk: an ``artifact`` on its ``base`` (None if it has weights of its own), or the bare base.
    ``name`` is how the user calls it, ``described`` says what it is, and ``dtype`` is that of its weights.
    ``chat_template`` replaces the one of a bare base, and ``template_options`` are its options. A result's tokenizer
    has both."""

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


_KINDS = {
    kind.exit_code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, AlignmentError)
}


def write_error(file: Path, error: AlignmentError) -> None:
    """Writes an error for the driver."""
    written = {"code": error.exit_code, "message": error.message, "where": error.where, "remedy": error.remedy}
    write_text(file, json.dumps(written))


def written_error(file: Path) -> AlignmentError | None:
    """The error that was written, if there was one."""
    if not file.is_file():
        return None
    written = json.loads(file.read_text(encoding="utf-8"))
    return _KINDS[written["code"]](written["message"], where=written["where"], remedy=written["remedy"])
