"""Where a stage's rows come from, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import BETWEEN, FILLED, FRACTION, PART, POSITIVE


class OnError(str, Enum):
    """What to do with a faulty row: ``fail`` stops before training, ``skip`` leaves the row out and records it."""

    fail = "fail"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """``source`` is ``bundled:quickstart/NAME``, ``path:FILE`` of a file or a folder of files, or a hub's data set,
    ``hub:ORG/NAME@REVISION``, of which ``split`` and ``subset`` (the hub's configuration) are read.

    ``format`` names one of alignment/data/formats; without it, the columns decide. ``columns`` maps the format's
    columns to those of the file (``{prompt: my_question}``), ``placeholders`` maps each ``{{name}}`` in texts to its
    replacement. ``limit`` reads only the first records; None reads all. With ``on_error: skip`` at most a share of
    ``max_skipped`` of the rows may be left out; this share is not checked if ``limit`` ends the reading. A result
    depends on what the file holds, not on where it is, so ``source`` is not part of a fingerprint; the content's hash
    is.
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
    """Rows of another source: all of them, or a random sample: a ``share`` of all rows of the stage, or ``count``
    rows."""

    share: Annotated[float | None, BETWEEN] = None
    count: Annotated[int | None, POSITIVE] = None


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """The rows of a stage, and ``mix``, rows that are mixed in from other sources, such as general data against
    forgetting.

    ``fraction`` is the share of the stage's own rows that is used, drawn at random. With .25 they are a subset of those
    with .5, and they do not depend on the stage's name.
    """

    mix: list[MixedConfig] = field(default_factory=list)
    fraction: Annotated[float, PART] = 1.0
