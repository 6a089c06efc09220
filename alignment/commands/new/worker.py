"""Counts the tokens of the first records of data files: ``python -m alignment.commands.new.worker ASKED ANSWER``.

``align new`` calls it with two JSON files. It loads the tokenizer, but no model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from alignment.commands.shared.stored_policy import write_error
from alignment.commands.shared.worker_process import run_as_program, silence_libraries
from alignment.config.data import OnError, SourceConfig
from alignment.config.model import TemplateChoice
from alignment.config.new_recipe import Lengths
from alignment.core.artifacts import write_json
from alignment.core.errors import AlignmentError, DataError
from alignment.data.reading import iterate
from alignment.data.records import PlainText
from alignment.data.tokens import row_kinds
from alignment.data.tokens.row_kinds import Kind, Limits, Tokenized, tokenized
from alignment.data.tokens.thoughts import LOSSES, lost_words
from alignment.data.tokens.tokenizer import load_tokenizer

LOOKED_AT = 5_000
"""Maximum number of records of a file whose tokens are counted."""
_AT_ONCE = 500
_LIMITS = Limits(row=sys.maxsize)
_KINDS = {
    kind.record.__name__: kind
    for kind in (
        row_kinds.CONVERSATIONS,
        row_kinds.LABELLED_ANSWERS,
        row_kinds.PAIRS,
        row_kinds.PROMPTS,
        row_kinds.TEXTS,
    )
}


def main(arguments: Sequence[str]) -> int:
    """Answers one request, or writes ``error.json`` beside it. Returns exit code 0."""
    asked, answer = map(Path, arguments)
    silence_libraries()
    try:
        lengths = measured(json.loads(asked.read_text(encoding="utf-8")))
    except AlignmentError as error:
        write_error(answer.with_name("error.json"), error)
        return 0
    write_json(answer, [asdict(of_file) for of_file in lengths])
    return 0


def measured(asked: Mapping[str, Any]) -> list[Lengths]:
    """The lengths of each file's records: ``asked`` has the ``folder`` of a model, a chat ``template`` or None, and
    ``files`` with their ``path``, ``record`` and ``columns``. Raises ModelError, DataError."""
    tokenizer = load_tokenizer(Path(asked["folder"]), TemplateChoice(source=asked["template"]))
    return [_lengths(tokenizer, Path(file["path"]), _KINDS[file["record"]], file["columns"]) for file in asked["files"]]


def _lengths(tokenizer: Any, path: Path, kind: Kind, columns: dict[str, str]) -> Lengths:
    records = list(_tokenized(tokenizer, path, kind, columns))
    readable = [record for record in records if record.parts]
    if not readable:
        raise next((record.fault for record in records if record.fault), DataError("has no rows", where=str(path)))
    return Lengths(
        rows=[record.tokens for record in readable],
        prompts=[max(len(parts.prompt) for parts in record.parts) for record in readable],
        answers=[
            max((len(tokens) for parts in record.parts for tokens in parts.answers.values()), default=0)
            for record in readable
            if kind.record is not PlainText
        ],
        remarks=_remarks(records),
    )


def _remarks(records: Sequence[Tokenized]) -> list[str]:
    """Sentences on records that cannot be rendered, and on what the chat template leaves out of others."""
    faults = [record.fault for record in records if record.fault is not None]
    losing = {loss: sum(loss in record.lost for record in records) for loss in LOSSES}
    remarks = [lost_words(loss, count, len(records)) for loss, count in losing.items() if count]
    if faults:
        such = f"such as {Path(faults[0].where).name}: {faults[0].message}"
        remarks.append(f"{len(faults):,} of {len(records):,} records cannot be rendered, {such}")
    return remarks


def _tokenized(tokenizer: Any, path: Path, kind: Kind, columns: dict[str, str]) -> Iterator[Tokenized]:
    lenient = SourceConfig(columns=columns, on_error=OnError.skip, max_skipped=1.0)
    records = islice(iterate(path, kind.record, lenient), LOOKED_AT)
    while batch := list(islice(records, _AT_ONCE)):
        yield from tokenized(tokenizer, kind, batch, _LIMITS)


if __name__ == "__main__":
    run_as_program(lambda: main(sys.argv[1:]))
