"""Settings of data: sources, rows that are too long, replay and validation."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.rules import BETWEEN, FILLED, FRACTION, NOT_NEGATIVE, PART, POSITIVE


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
    is."""

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
    with .5, and they do not depend on the stage's name."""

    mix: list[MixedConfig] = field(default_factory=list)
    fraction: Annotated[float, PART] = 1.0


class TooLong(str, Enum):
    """``drop`` leaves the row out, ``cut`` removes tokens."""

    drop = "drop"
    cut = "cut"


class Side(str, Enum):
    """Which end of a prompt loses tokens."""

    left = "left"
    right = "right"


@dataclass(kw_only=True, slots=True)
class TooLongConfig:
    """With ``do: cut`` an answer longer than ``max_answer_length`` loses its end, including the token that ends the
    turn. If the row is still too long, the prompt loses tokens at its ``side``, except BOS and what the template adds
    after the last turn. A row with nothing left is dropped. At most the share ``max_share`` of a source's rows may be
    dropped or cut."""

    do: TooLong = TooLong.drop
    side: Side = Side.left
    max_share: Annotated[float, FRACTION] = field(default=0.1, metadata={"identity": False})


@dataclass(kw_only=True, slots=True)
class PtxConfig:
    """Ordinary language modelling alongside PPO, against forgetting (Ouyang et al. 2022, eq. 2).

    ``coefficient`` is the weight of the token-mean loss on the assistant turns of ``batch_size`` conversations per
    step; 0 turns it off."""

    coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    batch_size: Annotated[int, POSITIVE] = 8
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Evaluation on held-out rows, the validation, after every ``every`` optimiser steps (0: never) and after the last.

    The held-out rows are the rows of a ``share`` of the prompts, which are then not trained on, or all rows of a
    separate source, ``data``. A validation computes the training objective on them, without dropout. With ``keep_best``
    the stage keeps the weights with the lowest held-out loss, not the last ones. ``patience`` ends the stage after that
    many validations in a row without a new lowest loss."""

    share: Annotated[float | None, BETWEEN] = None
    data: DataConfig = field(default_factory=DataConfig)
    every: Annotated[int, NOT_NEGATIVE] = 0
    keep_best: bool = False
    patience: Annotated[int | None, POSITIVE] = None

    @property
    def on(self) -> bool:
        """Whether there is any validation."""
        return self.every > 0
