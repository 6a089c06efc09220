"""Where a stage's rows come from, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import BETWEEN, FILLED, FRACTION, PART, POSITIVE


class OnError(str, Enum):
    """What a faulty row does: ``fail`` stops before anything is trained, ``skip`` leaves it out and notes it."""

    fail = "fail"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """``source`` is ``bundled:quickstart/NAME``, ``path:FILE`` of a file or a folder of files, or a hub's data set,
    ``hub:ORG/NAME@REVISION``, of which ``split`` and ``subset`` (its name for a configuration) are read.

    ``format`` names one of alignment/data/formats; without it, the columns tell. ``columns`` says which of the file's
    columns is which of the format's (``{prompt: my_question}``), ``placeholders`` what stands for ``{{name}}`` in
    texts. ``limit`` takes the first records only; None takes all. With ``on_error: skip`` at most a share of
    ``max_skipped`` of the rows may be left out. A result is defined by what the file holds, not by where it lies, so
    ``source`` is no part of a fingerprint; the content's hash is.
    """

    source: str = field(default="", metadata={"identity": False})
    split: Annotated[str, FILLED] = "train"
    subset: Annotated[str | None, FILLED] = None
    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    placeholders: dict[str, str] = field(default_factory=dict)
    limit: Annotated[int | None, POSITIVE] = None
    on_error: OnError = field(default=OnError.fail, metadata={"identity": False})
    max_skipped: Annotated[float, FRACTION] = field(default=0.05, metadata={"identity": False})


@dataclass(kw_only=True, slots=True)
class MixedConfig(SourceConfig):
    """Rows drawn at random from another source: so many that they are ``share`` of all rows, or ``count`` of them."""

    share: Annotated[float | None, BETWEEN] = None
    count: Annotated[int | None, POSITIVE] = None


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """A stage's own rows, and ``mix``, what is mixed into them: general data against forgetting, say.

    ``fraction`` takes that part of the own rows, drawn at random: those of .25 are among those of .5, whatever the
    stage is called.
    """

    mix: list[MixedConfig] = field(default_factory=list)
    fraction: Annotated[float, PART] = 1.0
