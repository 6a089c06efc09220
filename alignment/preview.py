"""Rows as a stage will learn from them, printed: ``python -m alignment.preview STAGE.YAML … --rows N``.

``align preview`` calls it. It loads the tokenizer, no model. What is learned stands in ``⟦ ⟧``, on a terminal in green.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from alignment.config.data import OnError
from alignment.config.stage import PpoConfig, Trained
from alignment.data.reading import Reading, iterate, start
from alignment.data.records import Conversation, PlainText, PreferencePair, Prompt, Record
from alignment.data.sources import RECORDS
from alignment.data.tokenize import IGNORED, answer_ids, prompt_ids, tokenize_conversation, tokenize_text
from alignment.errors import AlignmentError, DataError
from alignment.models.load import load_tokenizer
from alignment.stage_spec import StageSpec, read_spec

LOOKED_AT = 5_000
"""Records whose tokens are counted."""
BARS = 8
WIDTH = 30


Tokens = tuple[list[int], list[bool]]
"""Token ids, and which of them are learned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Tokens that are all learned, or all not, as text."""

    text: str
    learned: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A record as the stage sees it: one sequence, or two for a pair; ``tokens`` of the longest, ``learned`` of all."""

    where: str
    sequences: dict[str, list[Piece]]
    tokens: int
    learned: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the first fault."""
    parser = argparse.ArgumentParser(prog="python -m alignment.preview", description=__doc__)
    parser.add_argument("stage_files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    told = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    console = Console(soft_wrap=True, emoji=False, highlight=False)
    try:
        for file in told.stage_files:
            show_stage(console, read_spec(file), rows=told.rows)
    except AlignmentError as error:
        Console(stderr=True, emoji=False).print(f"{error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    return 0


def show_stage(console: Console, spec: StageSpec, *, rows: int) -> None:
    """Prints the first records of each of a stage's sources and what all of them amount to.

    Raises:
        DataError: no row can be read, or one cannot be tokenised.
    """
    config = spec.config
    assert isinstance(config, Trained), "the driver hands on training stages"
    tokenizer = load_tokenizer(spec.base_path)
    limit = config.max_prompt_length if isinstance(config, PpoConfig) else config.max_length
    mixed = [(part, spec.extra_data[f"data.mix[{number}]"]) for number, part in enumerate(config.data.mix)]
    for data, path in [(config.data, spec.data_path), *mixed]:
        lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)  # faults are shown, not a reason to stop
        reading = start(path, lenient)
        records = islice(iterate(path, RECORDS[config.kind], lenient, reading=reading), LOOKED_AT)
        found = [shown(tokenizer, record, max_length=limit) for record in records]
        console.print(Text(f"{spec.stage}: {path}", style="bold"))
        console.print(f"format {reading.format.name}: {reading.format.summary}", markup=False)
        for one in found[:rows]:
            _print_record(console, one)
        for line in summary(found, reading, limit=limit):
            console.print(line, markup=False)
        console.print()


def shown(tokenizer: Any, record: Record, *, max_length: int) -> Shown:
    """The record's tokens, decoded again, with special tokens; a text is cut where the stage cuts it.

    Raises:
        DataError: it cannot be tokenised.
    """
    try:
        sequences, longest = _sequences(tokenizer, record, max_length)
    except DataError as error:
        raise DataError(error.message, where=record.where, remedy=error.remedy) from error
    learned = sum(sum(flags) for _, flags in sequences.values())
    pieces = {name: _pieces(tokenizer, ids, flags) for name, (ids, flags) in sequences.items()}
    return Shown(where=record.where, sequences=pieces, tokens=longest, learned=learned)


def _sequences(tokenizer: Any, record: Record, max_length: int) -> tuple[dict[str, Tokens], int]:
    """Tokens by name, with which of them are learned, and how long the longest row of the stage is."""
    if isinstance(record, PlainText):
        rows = [row.input_ids for row in tokenize_text(tokenizer, record.text, max_length=max_length)]
        named = {f"row {number}": _all(row, learned=True) for number, row in enumerate(rows, start=1)}
        return named, max(map(len, rows))
    if isinstance(record, Conversation):
        row = tokenize_conversation(tokenizer, record.messages, record.tools)
        return {"": (row.input_ids, [label != IGNORED for label in row.labels])}, len(row.input_ids)
    if isinstance(record, PreferencePair):
        prompt = prompt_ids(tokenizer, record.messages, record.tools)
        told = {"chosen": record.chosen, "rejected": record.rejected}
        answers = {name: answer_ids(tokenizer, record.messages, text, record.tools) for name, text in told.items()}
        named = {name: _all(ids, learned=True) for name, ids in answers.items()}
        longest = len(prompt) + max(map(len, answers.values()))
        return {"prompt": _all(prompt, learned=False), **named}, longest
    assert isinstance(record, Prompt), "no stage that trains reads another record"
    prompt = prompt_ids(tokenizer, record.messages, record.tools)
    return {"prompt": _all(prompt, learned=False)}, len(prompt)


def _all(ids: list[int], *, learned: bool) -> Tokens:
    return ids, [learned] * len(ids)


def summary(found: Sequence[Shown], reading: Reading, *, limit: int) -> list[str]:
    """How long records are, how many are too long, how much is learned, and what was left out."""
    lengths = [one.tokens for one in found]
    too_long = sum(length > limit for length in lengths)
    total, learned = sum(lengths), sum(one.learned for one in found)
    counted = f"the first {len(found):,} records" if len(found) == LOOKED_AT else f"{len(found):,} records"
    lines = [
        f"{counted}, {total:,} tokens"
        + (f", {learned:,} learned" if learned else "")
        + f"; longest {max(lengths):,}, limit {limit:,}: {too_long:,} too long",
        *histogram(lengths),
    ]
    for name, errors in (("set aside", reading.set_aside), ("faulty", reading.faults)):
        if errors:
            lines.append(f"{len(errors):,} rows {name}, such as {errors[0].where}: {errors[0].message}")
    return lines


def histogram(lengths: Sequence[int]) -> list[str]:
    """A bar for each of some equal ranges of lengths."""
    step = -(-max(lengths) // BARS)
    counts = [0] * BARS
    for length in lengths:
        counts[min(BARS - 1, (length - 1) // step)] += 1
    most = max(counts)
    return [
        f"  {place * step + 1:>6}–{(place + 1) * step:<6} {'█' * round(WIDTH * count / most)} {count:,}".rstrip()
        for place, count in enumerate(counts)
    ]


def _pieces(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> list[Piece]:
    runs = groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
    return [Piece(text=tokenizer.decode([token for token, _ in run]), learned=which) for which, run in runs]


def _print_record(console: Console, one: Shown) -> None:
    console.print(Text(f"── {Path(one.where).name} · {one.tokens:,} tokens", style="dim"))
    for name, pieces in one.sequences.items():
        text = Text(f"{name}: " if name else "", style="bold")
        for piece in pieces:
            shown_as = f"⟦{piece.text}⟧" if piece.learned else piece.text
            text.append(shown_as, style="green" if piece.learned else "not bold")
        console.print(text)


if __name__ == "__main__":
    sys.exit(main())
