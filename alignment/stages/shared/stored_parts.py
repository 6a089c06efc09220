"""Parts of a result that are stored as they are made, so that an interrupted stage continues after the last one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignment.core.files import parse_json, write_text
from alignment.core.fingerprint import digest
from alignment.records.worker import PARTS
from alignment.training.context import StageContext
from alignment.training.sharding import everyones, shared

log = logging.getLogger(__name__)


def made_in_parts(
    context: StageContext,
    name: str,
    keys: Sequence[Any],
    make: Callable[[int], Any],
    *,
    progress: Callable[[int], None],
    prepare: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The value of every part, in order, on every process.

    ``keys`` has an entry of plain values for each part: what its content depends on beside the stage's fingerprint.
    ``make`` computes a part by its number; its value must be plain JSON. The processes share the missing parts, and
    the main process stores them under ``name``. A part is always computed as a whole, so that the number of processes
    does not change it. ``progress`` receives how many parts are done. ``prepare`` is called on every process if a part
    is missing.
    """
    files = [_file(context, name, number, key) for number, key in enumerate(keys)]
    parts: list[Any] = everyones([_read(file) for file in files] if context.is_main else [])[0]
    missing = [number for number, value in enumerate(parts) if value is None]
    progress(len(parts) - len(missing))
    if missing:
        prepare()
    for first in range(0, len(missing), context.world_size):
        group = missing[first : first + context.world_size]
        values = shared(partial(make, group[context.rank]) if context.rank < len(group) else _nothing)
        for number, value in zip(group, values[: len(group)], strict=True):
            parts[number] = value
            if context.is_main:
                write_text(files[number], json.dumps({"value": value, "sha256": digest(json.dumps(value))}))
        progress(len(parts) - len(missing) + first + len(group))
    return parts


def _nothing() -> None:
    """What a process makes that is left over."""


def _file(context: StageContext, name: str, number: int, key: Any) -> Path:
    """Its name depends on all that the part depends on, so that a part of other settings is never read."""
    return context.checkpoints / PARTS.replace("*", f"{name}-{number}-{digest([context.spec.fingerprint, key])[:16]}")


def _read(file: Path) -> Any:
    """The stored value, or None if it is missing or damaged; the log names a damaged one."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        value = content["value"]
        if digest(json.dumps(value)) != content["sha256"]:
            raise ValueError("its content does not match its hash")
        return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        log.warning("%s cannot be used and will be made again: %s", file, error)
        return None
