"""Prints rows as a stage will learn from them: ``python -m alignment.commands.preview.worker STAGE.YAML … --rows N``.

``align preview`` calls it. It loads the tokenizer, but no model. Learned text is in ``⟦ ⟧`` and on a terminal green,
control tokens are magenta, and the part where two answers differ is underlined.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from alignment.commands.shared.worker_process import reported, run_as_program, silence_libraries
from alignment.config.data import DataConfig, MixedConfig, OnError, SourceConfig
from alignment.core import files
from alignment.core.errors import DataError
from alignment.core.terminal import Terminal
from alignment.core.wording import counted
from alignment.data.near_duplicates import record_key
from alignment.data.overlap import HeldOut, asked, asked_in
from alignment.data.reading import Reading, iterate, refuse_faults_of, start
from alignment.data.tokens.rendering import control_tokens, in_common
from alignment.data.tokens.row_kinds import Limits, Parts, RowTooLong, Tokenized, refuse_losses, tokenized
from alignment.data.tokens.thoughts import LOSSES
from alignment.data.tokens.tokenize import Tokens
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageSpec
from alignment.stages.registry import as_trained, learned_data, read_spec

BARS = 8
WIDTH = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpan:
    """The text of neighbouring tokens that agree in all properties. They are all ``learned`` or not, all ``control``
    tokens or not, and all in the part where two answers differ or not."""

    text: str
    learned: bool
    control: bool
    differs: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordSpans:
    """The token spans of a record as the stage reads it: one sequence, several sequences of a conversation, or a prompt
    and its answers by name. ``tokens`` counts the longest sequence before anything was ``cut``, ``learned`` all learned
    tokens. With ``has_lookalikes`` some of the text looks like a control token but is ordinary text."""

    where: str
    sequences: dict[str, list[TokenSpan]]
    tokens: int
    learned: int
    has_lookalikes: bool
    cut: str = ""


def record_spans(tokenizer: Any, tokenized: Tokenized) -> RecordSpans:
    """Decodes the tokens of a record without a fault, including control tokens."""
    assert tokenized.parts, "a record with a fault has no tokens"
    control = control_tokens(tokenizer)
    sequences = _sequences(tokenized)
    differ = _differences(tokenized.parts[0])
    text = "".join(tokenizer.decode(tokens.ids) for tokens in sequences.values())
    real = sum(token in control.ids.values() for tokens in sequences.values() for token in tokens.ids)
    return RecordSpans(
        where=tokenized.record.where,
        sequences={name: _token_spans(tokenizer, tokens, differ.get(name)) for name, tokens in sequences.items()},
        tokens=tokenized.tokens,
        learned=sum(sum(tokens.learned) for tokens in sequences.values()),
        has_lookalikes=len(control.pattern.findall(text)) > real,
        cut=tokenized.cut,
    )


def _sequences(tokenized: Tokenized) -> dict[str, Tokens]:
    parts = tokenized.parts[0]
    if "text" in parts.answers:
        rows = [row["input_ids"] for row in tokenized.rows]
        return {f"row {number}": Tokens(ids=ids, learned=[True] * len(ids)) for number, ids in enumerate(rows, start=1)}
    if "answer" in parts.answers:
        whole = [sequence.prompt + sequence.answers["answer"] for sequence in tokenized.parts]
        return {f"sequence {index}" if len(whole) > 1 else "": tokens for index, tokens in enumerate(whole, start=1)}
    return {"prompt": parts.prompt, **parts.answers}


def _differences(parts: Parts) -> dict[str, range]:
    answers = {name: tokens.ids for name, tokens in parts.answers.items()}
    if len(answers) != 2:
        return {}
    start = in_common(*answers.values())
    end = in_common(*(ids[start:][::-1] for ids in answers.values()))
    return {name: range(start, len(ids) - end) for name, ids in answers.items()}


def _token_spans(tokenizer: Any, tokens: Tokens, differs: range | None) -> list[TokenSpan]:
    control = set(control_tokens(tokenizer).ids.values())
    marked = [
        (token, (learned, token in control, differs is not None and index in differs))
        for index, (token, learned) in enumerate(zip(tokens.ids, tokens.learned, strict=True))
    ]
    return [
        TokenSpan(text=tokenizer.decode([token for token, _ in span]), learned=key[0], control=key[1], differs=key[2])
        for key, span in groupby(marked, key=lambda pair: pair[1])
    ]


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lines with a bar for each of ``BARS`` equal ranges of lengths."""
    step = -(-max(lengths) // BARS)
    counts = [0] * BARS
    for length in lengths:
        counts[min(BARS - 1, (length - 1) // step)] += 1
    most = max(counts)
    return [
        f"  {bar * step + 1:>6}–{(bar + 1) * step:<6} {'█' * round(WIDTH * count / most)} {count:,}".rstrip()
        for bar, count in enumerate(counts)
    ]


CONTENT_POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; """
    """img-src data:; base-uri 'none'; form-action 'none'">"""
)
"""The same policy as on the report's pages: the page loads and runs nothing, whatever the rows contain."""
LOOKED_AT = 5_000
"""Maximum number of records whose tokens are counted."""


@reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns exit code 0, or that of the first error."""
    parser = argparse.ArgumentParser(prog="python -m alignment.commands.preview.worker", description=__doc__)
    parser.add_argument("stage_files", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--against", type=Path, help="an evaluation's stage file, whose prompts must not be learned")
    options = parser.parse_args(arguments)
    silence_libraries()
    console = Terminal(soft_wrap=True, highlight=False, record=options.html is not None)
    held_out = None
    if options.against is not None:
        evaluation = read_spec(options.against)
        data = getattr(evaluation.config, "data", None)
        assert isinstance(data, DataConfig), "the driver names an evaluation"
        held_out = HeldOut(asked_in(evaluation.data_path, data))
    for file in options.stage_files:
        show_stage(console, read_spec(file), rows=options.rows, held_out=held_out)
    if options.html is not None:
        with files.explained(options.html.parent):
            head = '<meta charset="UTF-8">'
            files.write_text(options.html, console.export_html().replace(head, f"{head}\n{CONTENT_POLICY}", 1))
    return 0


def show_stage(console: Console, spec: StageSpec, *, rows: int, held_out: HeldOut | None = None) -> None:
    """Prints the first records of each of a stage's sources, and a summary of all. Raises DataError."""
    config = as_trained(spec.config)
    assert config is not None, "the driver passes only training stages"
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    kind, limits = learned_data(config)
    for number, (data, path) in enumerate(spec.sources(config.data, "data")):
        setting = f"stages.{spec.stage}.data" + (f".mix[{number - 1}]" if number else "")
        # Faults are printed and do not stop the preview.
        lenient = replace(data, on_error=OnError.skip, max_skipped=1.0)
        reading = start(path, lenient, setting=setting)
        records = list(islice(iterate(path, kind.record, lenient, reading=reading), LOOKED_AT))
        is_whole = len(records) < LOOKED_AT or len(records) == data.limit
        reading.stopped = reading.stopped or len(records) == LOOKED_AT
        tokenized_records = list(tokenized(tokenizer, kind, records, limits))
        readable = [record_spans(tokenizer, record) for record in tokenized_records if record.parts]
        faults = [
            record.fault
            for record in tokenized_records
            if record.fault is not None and not isinstance(record.fault, RowTooLong)
        ]
        if len(faults) == len(tokenized_records):
            raise faults[0]
        console.print(Text(f"{spec.stage}: {path}", style="bold"))
        console.print(f"format {reading.format.name}: {reading.format.summary}", markup=False)
        for spans in readable[:rows]:
            _print_record(console, spans)
        for fault in faults:
            reading.faults.add(fault)
        lines = [*_of_tokens(tokenized_records, readable, limits), *_of_rows(tokenized_records, readable, reading)]
        lines += [
            *_overlaps(records, held_out),
            *_taken(data, len(records)),
            *_stops(tokenized_records, reading, data, limits, is_whole=is_whole),
        ]
        for line in lines:
            console.print(line, markup=False)
        console.print()


def _of_tokens(records: Sequence[Tokenized], readable: Sequence[RecordSpans], limits: Limits) -> list[str]:
    lengths = [record.tokens for record in records if record.tokens]
    too_long = sum(isinstance(record.fault, RowTooLong) for record in records)
    cut = sum(record.cut != "" for record in records)
    learned = sum(spans.learned for spans in readable)
    which = f"the first {len(records):,} records" if len(records) == LOOKED_AT else counted(len(records), "record")
    return [
        f"{which}, {sum(lengths):,} tokens"
        + (f", {learned:,} learned" if learned else "")
        + f"; longest {max(lengths):,}, limit {limits.row:,}: {too_long:,} too long"
        + (f", {cut:,} cut" if limits.cuts else ""),
        *histogram(lengths),
    ]


def _of_rows(records: Sequence[Tokenized], readable: Sequence[RecordSpans], reading: Reading) -> list[str]:
    keys = [record_key(record.record) for record in records]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    repeated = [record.record.where for index, record in enumerate(records) if first[keys[index]] != index]
    lookalikes = [spans.where for spans in readable if spans.has_lookalikes]
    split = [record.record.where for record in records if len(record.parts) > 1]
    oddities = [
        ("repeats", "repeat", "an earlier one", repeated),
        ("has", "have", "text that looks like a control token but is ordinary text", lookalikes),
        ("becomes", "become", "several rows, because the chat template changes earlier turns", split),
    ]
    for loss in LOSSES:
        losing = [record.record.where for record in records if loss in record.lost]
        oddities.append(("loses", "lose", f"{loss} in the chat template", losing))
    lines = [
        f"{counted(len(rows), f'record {verb}', f'records {plural}')} {rest}, such as {rows[0]}"
        for verb, plural, rest, rows in oddities
        if rows
    ]
    for name, left_out in (("set aside", reading.set_aside), ("faulty", reading.faults)):
        for error in left_out.first[:1]:
            remedy = f" → {error.remedy}" if error.remedy else ""
            lines.append(f"{counted(left_out.count, 'row')} {name}, such as {error.where}: {error.message}{remedy}")
    return lines


def _overlaps(records: Sequence[Any], held_out: HeldOut | None) -> list[str]:
    overlaps = [] if held_out is None else list(held_out.overlaps(asked(record) for record in records))
    if not overlaps:
        return []
    first = overlaps[0]
    return [
        f"{counted(len(overlaps), 'record resembles a prompt', 'records resemble prompts')} of the evaluation, "
        f"such as {first.learned}, "
        f"which has {first.share:.0%} of {first.held_out}"
    ]


def _taken(data: SourceConfig, records: int) -> list[str]:
    """A line on how many of these records the stage uses, unless it uses all."""
    if isinstance(data, MixedConfig) and data.share is not None:
        return [f"mixed in: {data.share:.0%} of all rows"]
    if isinstance(data, MixedConfig):
        return ["mixed in: all of these" if data.count is None else f"mixed in: {data.count:,} of these"]
    if isinstance(data, DataConfig) and data.fraction < 1.0:
        return [f"data.fraction={data.fraction:g}: about {math.ceil(data.fraction * records):,} of these are used"]
    return []


def _stops(
    records_of_source: Sequence[Tokenized], reading: Reading, data: SourceConfig, limits: Limits, *, is_whole: bool
) -> list[str]:
    """A line on why the stage would stop at these records, if it would; ``is_whole``: the stage reads no others."""
    number = len(records_of_source)
    others = "" if is_whole else f"if the other records are like the first {number:,}, "
    dropped = sum(isinstance(record.fault, RowTooLong) for record in records_of_source)
    cut = sum(record.cut != "" for record in records_of_source)
    longest, where = max(record.tokens for record in records_of_source), str(reading.path)
    try:
        refuse_faults_of(reading, data)
    except DataError as error:
        return [f"the stage would stop: {error.message.splitlines()[0]} → {error.remedy}"]
    try:
        refuse_losses(limits, dropped=dropped, cut=cut, records=number, longest=longest, where=where)
    except DataError as error:
        return [f"{others}the stage would stop: {error.message.splitlines()[0]} → {error.remedy}"]
    return []


def _print_record(console: Console, record: RecordSpans) -> None:
    cut = f" · cut: {record.cut}" if record.cut else ""
    console.print(Text(f"── {Path(record.where).name} · {record.tokens:,} tokens{cut}", style="dim"))
    for name, spans in record.sequences.items():
        text = Text(f"{name}: " if name else "", style="bold")
        for learned, group in groupby(spans, key=lambda span: span.learned):
            text.append("⟦" if learned else "", style="green")
            for span in group:
                colour = "magenta" if span.control else "green" if span.learned else "default"
                text.append(span.text, style=f"not bold {'underline ' if span.differs else ''}{colour}")
            text.append("⟧" if learned else "", style="green")
        console.print(text)


if __name__ == "__main__":
    run_as_program(main)
