"""Rows as a stage will learn from them, printed: ``python -m alignment.commands.preview.worker STAGE.YAML … --rows N``.

``align preview`` calls it. It loads the tokenizer, no model. What is learned stands in ``⟦ ⟧``, on a terminal in green;
control tokens are magenta, and what two answers do not share is underlined.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from alignment.config.data import DataConfig, MixedConfig, OnError, SourceConfig
from alignment.core.errors import AlignmentError, DataError
from alignment.core.streams import make_unfailing
from alignment.core.terminal import Terminal, complain
from alignment.data.doctor import record_key
from alignment.data.overlap import HeldOut, asked, asked_in
from alignment.data.reading import Reading, iterate, refuse_faults, start
from alignment.data.tokens.limits import Limits, RowTooLong, refuse_losses
from alignment.data.tokens.row_kinds import Tokenized, tokenized
from alignment.data.tokens.token_spans import Run, Shown, histogram, shown
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageSpec
from alignment.stages.registry import as_trained, learned_data
from alignment.stages.stage_file import read_spec

CONTENT_POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; """
    """img-src data:; base-uri 'none'; form-action 'none'">"""
)
"""That of the report's pages."""
LOOKED_AT = 5_000
"""Records whose tokens are counted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the first fault."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.preview.worker", description=__doc__)
    parser.add_argument("stage_files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--against", type=Path, help="an evaluation's stage file: its prompts must not be learned")
    told = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    console = Terminal(soft_wrap=True, highlight=False, record=told.html is not None)
    try:
        held_out = None if told.against is None else _held_out(read_spec(told.against))
        for file in told.stage_files:
            show_stage(console, read_spec(file), rows=told.rows, held_out=held_out)
    except AlignmentError as error:
        complain(error)
        return error.exit_code
    if told.html is not None:
        told.html.write_text(_page(console), encoding="utf-8")
    return 0


def _page(console: Console) -> str:
    """All that was printed, as a page that loads nothing and runs nothing, whatever the rows say."""
    head = '<meta charset="UTF-8">'
    return console.export_html().replace(head, f"{head}\n{CONTENT_POLICY}", 1)


def _held_out(spec: StageSpec) -> HeldOut:
    data = getattr(spec.config, "data", None)
    assert isinstance(data, DataConfig), "the driver names an evaluation"
    return HeldOut(asked_in(spec.data_path, data))


def show_stage(console: Console, spec: StageSpec, *, rows: int, held_out: HeldOut | None = None) -> None:
    """Prints the first records of each of a stage's sources and what all of them amount to.

    Raises:
        DataError: no row can be read, or none can be tokenised.
    """
    config = as_trained(spec.config)
    assert config is not None, "the driver hands on training stages"
    tokenizer = load_tokenizer(spec.base_path, spec.model.chat_template)
    kind, limits = learned_data(config)
    mixed = [(part, spec.extra_data[f"data.mix[{number}]"]) for number, part in enumerate(config.data.mix)]
    for data, path in [(config.data, spec.data_path), *mixed]:
        lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)  # faults are shown, not a reason to stop
        reading = start(path, lenient)
        records = list(islice(iterate(path, kind.record, lenient, reading=reading), LOOKED_AT))
        found = list(tokenized(tokenizer, kind, records, limits))
        readable = [shown(tokenizer, one) for one in found if one.parts is not None]
        faults = [one.fault for one in found if one.fault is not None and not isinstance(one.fault, RowTooLong)]
        if len(faults) == len(found):
            raise faults[0]
        console.print(Text(f"{spec.stage}: {path}", style="bold"))
        console.print(f"format {reading.format.name}: {reading.format.summary}", markup=False)
        for one in readable[:rows]:
            _print_record(console, one)
        reading.faults += faults
        lines = [*_of_tokens(found, readable, limits), *_of_rows(found, readable, reading)]
        lines += [*_overlaps(records, held_out), *_taken(data, len(records)), *_stops(found, reading, data, limits)]
        for line in lines:
            console.print(line, markup=False)
        console.print()


def _of_tokens(found: Sequence[Tokenized], readable: Sequence[Shown], limits: Limits) -> list[str]:
    """How long records are, how many are too long, and how much is learned."""
    lengths = [one.tokens for one in found if one.tokens]
    too_long = sum(isinstance(one.fault, RowTooLong) for one in found)
    cut = sum(one.cut != "" for one in found)
    learned = sum(one.learned for one in readable)
    counted = f"the first {len(found):,} records" if len(found) == LOOKED_AT else f"{len(found):,} records"
    return [
        f"{counted}, {sum(lengths):,} tokens"
        + (f", {learned:,} learned" if learned else "")
        + f"; longest {max(lengths):,}, limit {limits.row:,}: {too_long:,} too long"
        + (f", {cut:,} cut" if limits.cuts else ""),
        *histogram(lengths),
    ]


def _of_rows(found: Sequence[Tokenized], readable: Sequence[Shown], reading: Reading) -> list[str]:
    """What is odd about rows, each with an example."""
    keys = [record_key(one.record) for one in found]
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    repeated = [one.record.where for place, one in enumerate(found) if first[keys[place]] != place]
    lookalikes = [one.where for one in readable if one.has_lookalikes]
    told = [
        ("repeat an earlier one", repeated),
        ("have text that reads like a control token and stays text", lookalikes),
    ]
    lines = [f"{len(places):,} records {what}, such as {places[0]}" for what, places in told if places]
    for name, errors in (("set aside", reading.set_aside), ("faulty", reading.faults)):
        if errors:
            lines.append(f"{len(errors):,} rows {name}, such as {errors[0].where}: {errors[0].message}")
    return lines


def _overlaps(records: Sequence[Any], held_out: HeldOut | None) -> list[str]:
    found = [] if held_out is None else list(held_out.overlaps(asked(record) for record in records))
    if not found:
        return []
    one = found[0]
    return [
        f"{len(found):,} records ask what the evaluation asks, such as {one.learned}, which has {one.share:.0%} of "
        f"{one.held_out}"
    ]


def _taken(data: SourceConfig, records: int) -> list[str]:
    """What the stage takes of these records, where that is not all of them."""
    if isinstance(data, MixedConfig):
        return [f"mixed in: {f'{data.count:,} of these' if data.share is None else f'{data.share:.0%} of all rows'}"]
    if isinstance(data, DataConfig) and data.fraction < 1.0:
        return [f"data.fraction={data.fraction:g}: about {math.ceil(data.fraction * records):,} of these are taken"]
    return []


def _stops(found: Sequence[Tokenized], reading: Reading, data: SourceConfig, limits: Limits) -> list[str]:
    """Why the stage would stop on these records instead of training."""
    dropped, cut = sum(isinstance(one.fault, RowTooLong) for one in found), sum(one.cut != "" for one in found)
    longest, where = max(one.tokens for one in found), str(reading.path)
    try:
        refuse_faults(reading.faults, data, count=len(reading.faults), rows=reading.rows, where=where)
        refuse_losses(limits, dropped=dropped, cut=cut, records=len(found), longest=longest, where=where)
    except DataError as error:
        return [f"the stage would stop: {error.message.splitlines()[0]} → {error.remedy}"]
    return []


def _print_record(console: Console, one: Shown) -> None:
    cut = f" · cut: {one.cut}" if one.cut else ""
    console.print(Text(f"── {Path(one.where).name} · {one.tokens:,} tokens{cut}", style="dim"))
    for name, runs in one.sequences.items():
        text = Text(f"{name}: " if name else "", style="bold")
        for learned, group in groupby(runs, key=lambda run: run.learned):
            text.append("⟦" if learned else "", style="green")
            for run in group:
                text.append(run.text, style=_style(run))
            text.append("⟧" if learned else "", style="green")
        console.print(text)


def _style(run: Run) -> str:
    colour = "magenta" if run.control else "green" if run.learned else "default"
    return f"not bold {'underline ' if run.differs else ''}{colour}"


if __name__ == "__main__":
    make_unfailing()
    sys.exit(main())
