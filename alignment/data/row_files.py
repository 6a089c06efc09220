"""Raw rows of a file: JSON Lines, JSON, CSV and Parquet, compressed or not, or of a folder of these. A row that cannot
be parsed is replaced by a ``DataError``, so that one pass finds all faults. Lines of JSON are also available unparsed,
so that several processes can parse them."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from alignment.core.errors import DataError
from alignment.core.files import parse_json, refuse_endless
from alignment.data import caps

if TYPE_CHECKING:
    from pyarrow import RecordBatch


class NotUtf8(DataError):
    """A line that is not UTF-8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """``where`` is ``FILE:LINE`` if rows are lines, else ``FILE: row NUMBER``; numbers begin at 1."""

    where: str
    value: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLine:
    """A line that is not parsed yet."""

    where: str
    text: bytes


Unparsed = JsonLine | RawRow | DataError


def rows_of(path: Path) -> Iterator[RawRow | DataError]:
    """The rows in order; files of a folder are read in the order of their names. Only one row is held in memory, but of
    a JSON file the whole list. Raises DataError: the file as a whole cannot be read."""
    return map(parsed, unparsed_rows_of(path))


def unparsed_rows_of(path: Path) -> Iterator[Unparsed]:
    """Like ``rows_of``, but lines of JSON stay unparsed; ``parsed`` makes rows of them. Raises DataError: the file as a
    whole cannot be read."""
    for file in files_of(path):
        try:
            yield from _READERS[_suffix(file)](file)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot be read or unpacked: {error}", where=str(file)) from error


def parsed(row: Unparsed) -> RawRow | DataError:
    """The row of a line, or the error if it cannot be parsed."""
    return _parsed(row.text, row.where) if isinstance(row, JsonLine) else row


def files_of(path: Path) -> list[Path]:
    """The file itself, or the data files in a folder, by their suffixes. Raises DataError: the file has another suffix
    or may never end (a pipe), or the folder has no data file, or a link that leads to none."""
    if path.is_dir():
        entries = sorted(file for file in path.iterdir() if _suffix(file) in _READERS)
        if broken := next((entry for entry in entries if entry.is_symlink() and not entry.exists()), None):
            raise DataError("is a link that leads to no file", where=str(broken), remedy="correct or remove the link")
        files = [entry for entry in entries if entry.is_file()]
        if not files:
            raise DataError("contains no data file", where=str(path), remedy=_REMEDY)
        return files
    if _suffix(path) not in _READERS:
        raise DataError("has an unknown file type", where=str(path), remedy=_REMEDY)
    refuse_endless(path)
    return [path]


def is_named_as_data(path: Path) -> bool:
    return _suffix(path) in _READERS


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _json_lines(path: Path) -> Iterator[Unparsed]:
    first = True
    with caps.opened(path) as stream:
        _refuse_other_unicode(stream, path)
        for where, line in caps.lines(stream, path):
            if isinstance(line, DataError):
                yield line
            elif line.strip():
                if first and _begins_array(line):
                    raise DataError("is one JSON array, not JSON Lines", where=str(path), remedy=_ARRAY_REMEDY)
                first = False
                yield JsonLine(where=where, text=line.rstrip(b"\r\n"))


def _begins_array(line: bytes) -> bool:
    """Whether the file is one JSON array, on one line or several. A row would be an object."""
    if not line.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"[{", b"[ ", b"[\n", b"[\r")):
        return False
    try:
        value = parse_json(line)
    except ValueError:
        return True
    return isinstance(value[0], dict) if value else False


def _parsed(text: bytes, where: str) -> RawRow | DataError:
    try:
        value = _DECODER.decode(text.decode(json.detect_encoding(text)))  # of bytes, json.loads accepts surrogates
        if b"\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        if text.count(b"[") + text.count(b"{") > caps.LEVELS and caps.is_deep(value):
            return DataError(f"nests lists and objects more than {caps.LEVELS} levels deep", where=where)
        return RawRow(where=where, value=value)
    except _RepeatedKey as error:
        return DataError(
            f"has the key {str(error)!r} twice in one object", where=where, remedy="remove or rename one of them"
        )
    except UnicodeEncodeError:
        return DataError(
            "contains half of a surrogate pair, which is not a character", where=where, remedy="write both halves"
        )
    except UnicodeDecodeError as error:
        return _not_utf8(error, where)
    except (ValueError, RecursionError) as error:
        line, message = _located(error, where)
        return DataError(f"not JSON: {message}", where=line, remedy="write one JSON object per line (JSON Lines)")


class _RepeatedKey(Exception):
    """A key that an object has twice; carries it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _located(error: Exception, where: str) -> tuple[str, str]:
    if not isinstance(error, json.JSONDecodeError):
        return where, str(error)
    text = error.doc.rstrip()
    at = min(error.pos, len(text))
    message = f"{error.msg.removesuffix(' at')} at column {at - text.rfind(chr(10), 0, at)}"
    is_document = "\n" in text  # a line of JSON Lines has its number already
    return f"{where}:{text.count(chr(10), 0, at) + 1}" if is_document else where, message


def _not_utf8(error: UnicodeDecodeError, where: str) -> NotUtf8:
    line = error.object[error.object.rfind(b"\n", 0, error.start) + 1 : error.start]
    byte = error.object[error.start]
    meant = bytes([byte]).decode("latin-1")
    guess = f" ({meant!r} in Latin-1)" if meant.isprintable() else ""
    if byte == _SURROGATE and error.object[error.start + 1 : error.start + 2] >= b"\xa0":
        guess = " (half of a surrogate pair, as in CESU-8)"
    return NotUtf8(
        f"not UTF-8: byte 0x{byte:02x} at column {len(line.decode(errors='replace')) + 1}{guess}",
        where=where,
        remedy="save this line as UTF-8, or the whole file if it has another encoding",
    )


def _refuse_other_unicode(stream: BinaryIO, path: Path) -> None:
    head = cast("io.BufferedReader", stream).peek(4)[:4]
    name = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if name is not None:
        remedy = f"convert it: iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"
        raise DataError(f"is {name}, not UTF-8", where=str(path), remedy=remedy)


def _json(path: Path) -> Iterator[Unparsed]:
    """A list of rows; or JSON Lines with the wrong suffix, which is common in public data sets."""
    with caps.opened(path) as stream:
        text = caps.whole(stream, path)
    document = _parsed(text, str(path))
    is_fault = isinstance(document, DataError)
    if isinstance(document, RawRow) and isinstance(document.value, list):
        for number, value in enumerate(document.value, start=1):
            yield RawRow(where=f"{path}: row {number}", value=value)
    elif text.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{" and (is_fault or b"\n" not in text.strip()):
        yield from _json_lines(path)
    elif isinstance(document, DataError):
        raise document
    else:
        raise DataError("is JSON, but not a list of rows", where=str(path), remedy=_REMEDY)


def _csv(path: Path) -> Iterator[Unparsed]:
    csv.field_size_limit(caps.LINE_BYTES)
    # Line breaks inside quotes are part of a field, so the reader gets them as they are.
    with caps.opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        _refuse_other_unicode(stream, path)
        lines, reader = caps.text_lines(text, path), None
        while True:
            where = str(path)
            try:
                reader = reader or _csv_reader(lines)
                names = reader.fieldnames or []
                _refuse_repeated(names, where)
                where = f"{path}:{reader.line_num + 1}"
                row = next(reader)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                remedy = "save the file as UTF-8"
                raise NotUtf8(f"not UTF-8: byte 0x{byte:02x} here or later", where=where, remedy=remedy) from error
            except csv.Error as error:
                yield DataError(f"not CSV: {error}", where=where)
                continue
            if None in row or None in row.values():
                yield DataError(f"does not have {len(names)} fields, as the header does", where=where)
            else:
                yield RawRow(where=where, value={name: value or None for name, value in row.items()})


def _csv_reader(lines: Iterator[str]) -> csv.DictReader[str]:
    header = next(lines, "")
    separator = next((mark for mark in _SEPARATORS if mark in header), _SEPARATORS[0])
    return csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)


def _refuse_repeated(columns: Sequence[str], where: str) -> None:
    """Refuses columns of one name, of which only the last would be read. Raises DataError: there are some."""
    repeated = next((name for name in columns if name and columns.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"has the column {repeated!r} twice", where=where, remedy="remove or rename one of them")


def _parquet(path: Path) -> Iterator[Unparsed]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                if batch.nbytes > caps.WHOLE_BYTES:
                    where = f"{path}: rows {number + 1} to {number + len(batch)}"
                    raise DataError("are too large for memory", where=where, remedy="write shorter rows")
                for value in _python_rows(batch):
                    number += 1
                    where = f"{path}: row {number}"
                    yield DataError(value, where=where) if isinstance(value, str) else RawRow(where=where, value=value)
    except (ArrowException, OSError) as error:
        raise DataError(f"not Parquet: {error}", where=str(path)) from error


def _python_rows(batch: RecordBatch) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; for a row with a value that Python cannot hold, a text that says which."""
    try:
        rows = batch.to_pylist()
    except _UNUSABLE:
        rows = [_python_row(batch, number) for number in range(len(batch))]
    yield from (row if isinstance(row, str) else without_filled(row) for row in rows)


def _python_row(batch: RecordBatch, number: int) -> dict[str, Any] | str:
    row: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[number].as_py()
        except _UNUSABLE as error:
            return f"has a value in column {name!r} that cannot be read: {error}"
    return row


_ROWS_AT_ONCE = 1_000
_UNUSABLE = (ValueError, OverflowError, LookupError)
"""Text that is not UTF-8, which Arrow does not check; times that are out of Python's range or in an unknown zone."""
_SURROGATE = 0xED
"""The first byte of a surrogate, if it is encoded like a character; the second is then at least 0xA0."""
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""The first bytes of files in other encodings of Unicode (byte order marks)."""
_SEPARATORS = (",", ";", "\t", "|")
"""What may separate the fields of a CSV file; the first of them that its header has does."""
_READERS: dict[str, Callable[[Path], Iterator[Unparsed]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_ARRAY_REMEDY = "rename it to .json, or write one object per line"
_REMEDY = (
    "give .jsonl, .json (a list of rows), .csv or .parquet, also .jsonl.gz, .json.gz, .csv.gz, or a folder of these"
)
_OF_FUNCTIONS = frozenset({"parameters", "input_schema", "arguments"})
"""A function has a name and one of these: OpenAI's and Anthropic's schema of a tool, or a call's arguments."""


def without_filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the null fields of the functions in its columns. Other columns, which a scorer may read, stay as
    they are. So does the row itself, whatever its columns are called."""
    return {column: _without_filled(value) for column, value in row.items()}


def _without_filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_filled(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "name" in value and not _OF_FUNCTIONS.isdisjoint(value):
        return _without_nulls(value)
    return {name: _without_filled(item) for name, item in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return value


TURNS = ("messages", "conversations", "chosen_messages", "rejected_messages")
"""Columns that are named after turns. In others, such as ``prompt`` or ``chosen``, JSON may be the text itself."""
_LISTS = (*TURNS, "completions", "choices", "turns", "history")
_TURNS, _TEXTS = re.compile(r"\s*\[\s*\{"), re.compile(r"\s*\[\s*['\"]")


def with_lists(row: Any) -> Any:
    """The row with lists in place of their JSON; text that is no JSON of a list stays, for a format to refuse."""
    if not isinstance(row, Mapping):
        return row
    lists = {name: listed for name in _LISTS if (listed := _listed(row.get(name))) is not None}
    if "turns" in lists:  # then the references to them are text too, which elsewhere is one reference
        references = _listed(row.get("reference"))
        are_texts = all(value is None or isinstance(value, str) for value in references or ())
        if references is not None and are_texts and len(references) == len(lists["turns"]):
            lists["reference"] = references
    return {**row, **lists} if lists else row


def begins_turns(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list of objects."""
    return isinstance(value, str) and _TURNS.match(value) is not None


def begins_texts(value: Any) -> bool:
    """Whether ``value`` is text that begins like a list of quoted texts, unlike ``[A] 3 [B] 4``."""
    return isinstance(value, str) and _TEXTS.match(value) is not None


def _listed(value: Any) -> list[Any] | None:
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    row = parsed(JsonLine(where="", text=value.encode()))  # with the limits of a line of JSON
    return row.value if isinstance(row, RawRow) and isinstance(row.value, list) else None
