"""Refuses settings of validation that contradict one another, or for which a stage has too few steps or rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.faults import Fault, unread_faults, unread_notes
from alignment.config.stage import StageConfig

DATA = "validation.data"


def of_stage(config: StageConfig) -> ValidationConfig | None:
    """The validation of a stage, if its kind has such settings and they are used."""
    validation = getattr(config, "validation", None)
    return validation if isinstance(validation, ValidationConfig) and validation.on else None


def settings_faults(validation: ValidationConfig, where: str) -> Iterator[Fault]:
    """Settings, at the path ``where``, that contradict one another."""
    share, source = validation.share, validation.data.source
    if share is not None and source:
        message = f"{share:g} of the stage's own prompts, but {where}.data also names validation rows; remove one"
        yield Fault(where=f"{where}.share", message=message)
    if validation.on and share is None and not source:
        message = f"{validation.every}, but there are no held-out rows; set {where}.share=0.05, or {where}.data.source"
        yield Fault(where=f"{where}.every", message=message)
    settings = [field.name for field in fields(DataConfig)]
    if validation.on and share is not None and not source:
        settings.remove("source")
        yield from unread_notes(validation.data, DataConfig(), settings, f"{where}.data", f"only {where}.data.source")
    if not validation.on:
        reader, usual = f"only validation ({where}.every above 0)", ValidationConfig()
        yield from unread_notes(validation, usual, ("share",), where, reader)
        yield from unread_notes(validation.data, usual.data, settings, f"{where}.data", reader)
        yield from unread_faults(validation, usual, ("keep_best", "patience"), where, reader)


def step_faults(validation: ValidationConfig, steps: int, where: str) -> Iterator[Fault]:
    """Settings that a stage of at most so many optimiser steps would never get to."""
    if validation.every > steps:
        message = f"{validation.every} is more than the {steps} optimiser steps of the stage; choose at most {steps}"
        yield Fault(where=f"{where}.every", message=message)
        return
    looks = math.ceil(steps / validation.every)
    if validation.patience is not None and validation.patience >= looks:
        of_all = f"of {looks} validation{'' if looks == 1 else 's'}, at most {looks - 1} can follow the best one"
        message = f"{validation.patience} has no effect: {of_all}; choose less, or validate more often"
        yield Fault(where=f"{where}.patience", message=message)


def num_held_out(validation: ValidationConfig | None, prompts: int) -> int:
    """How many of so many prompts are held out; each has one row or more."""
    return 0 if validation is None or validation.share is None else round(validation.share * prompts)


def row_faults(
    validation: ValidationConfig, *, rows: int, prompts: int, batch_size: int, where: str
) -> Iterator[Fault]:
    """A share for which the stage has too few rows: it has at most ``rows``, with at most so many different prompts."""
    held_out = num_held_out(validation, prompts)
    if validation.share is None:
        return
    if not 0 < held_out < prompts:
        too_few = f"{prompts} prompts are too few to hold out a share of {validation.share:g}"
        message = f"{too_few}; choose another share, add rows, or name separate rows in {where}.data"
        yield Fault(where=f"{where}.share", message=message)
    elif rows - held_out < batch_size:
        leaves = f"{validation.share:g} leaves at most {rows - held_out} of {rows} rows to learn from"
        message = f"{leaves}, less than a batch of {batch_size}; choose a smaller share or batch, or add rows"
        yield Fault(where=f"{where}.share", message=message)


def overlap_faults(
    data: DataConfig, validation: ValidationConfig, prompts: tuple[frozenset[int], frozenset[int]], where: str
) -> Iterator[Fault]:
    """Held-out prompts that are learned from; ``prompts`` are hashes of those that a plan has read, learned and held
    out. If only a part of a source is used, only the stage knows which rows are in it."""
    learned, held_out = prompts
    if data.fraction < 1.0 or validation.data.fraction < 1.0:
        return
    if shared := len(learned & held_out):
        both = f"{shared} of its {len(held_out)} different prompts are also training prompts"
        message = f"{both}, so their loss says little; remove them from one source, or use validation.share"
        yield Fault(where=f"{where}.data.source", message=message)
