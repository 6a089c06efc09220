"""A stage's rows as records, with a list of what was left out beside the result."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TypeVar

from alignment.config.data import DataConfig, SourceConfig
from alignment.data.mix import mixed
from alignment.data.reading import iterate, start
from alignment.data.records import Record
from alignment.training.context import StageContext

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)

LEFT_OUT = "left_out.jsonl"


def rows_of(context: StageContext, record: type[R], data: DataConfig, *, field: str = "data") -> list[R]:
    """The records of a stage's ``field`` with those that are mixed into them; what is left out goes to ``LEFT_OUT``.

    Raises:
        DataError: rows are faulty and may not be skipped, no record is left, or too few to mix.
    """
    spec = context.spec
    if field == "data" and context.is_main:  # an interrupted attempt has left its own list
        (context.content / LEFT_OUT).unlink(missing_ok=True)
    own = _read(context, record, data, spec.data_path if field == "data" else spec.extra_data[field])
    if not data.mix:
        return own
    parts = [
        (part, _read(context, record, part, spec.extra_data[f"{field}.mix[{number}]"]))
        for number, part in enumerate(data.mix)
    ]
    return mixed(own, parts, context.generator(f"{field}.mix"), where=f"stages.{spec.stage}.{field}")


def _read(context: StageContext, record: type[R], data: SourceConfig, path: Path) -> list[R]:
    reading = start(path, data)
    records = list(iterate(path, record, data, reading=reading))
    left_out = reading.ledger()
    if left_out and context.is_main:
        with (context.content / LEFT_OUT).open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
        log.warning(
            "%d of %d rows of %s were left out, such as %s: %s (%s has them all)",
            len(left_out),
            reading.rows,
            path,
            left_out[0]["where"],
            left_out[0]["reason"],
            LEFT_OUT,
        )
    return records
