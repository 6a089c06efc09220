"""JSON files as frozen dataclasses: one program writes them, others read them, and reading checks every field. A field
without a default has to be in the file. One with a default may be missing, as in a file of an older version. Keys that
no field has are passed over. The field ``version`` says which form a file has; a newer form is refused. ``read``
refuses a file in which anything has another form than its field. ``read_parts`` leaves such parts out: a page about a
run shows what a damaged file still says."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from alignment.core.artifacts import write_json
from alignment.core.errors import ArtifactError
from alignment.core.files import parse_json

Record = TypeVar("Record")

KEY = "json key"
"""Metadata of a field whose key in the file cannot be a name in Python: ``field(metadata={KEY: "from"})``."""
LEFT_OUT_IF_EMPTY = MappingProxyType({"left out if empty": True})
"""Metadata of a field that is not written where it is empty."""
VERSION = "version"
_ABSENT: Final = object()
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Line:
    """Marks text that is one line, of which a page shows so many characters: ``Annotated[str, Line(80)]``. Of a name
    that is longer, a page shows the end, in which paths differ."""

    limit: int
    is_name: bool = False


Name = Annotated[str, Line(200, is_name=True)]
"""Names are keys too, so few are ever cut; a page draws them shorter where there is little room."""
Label = Annotated[str, Line(48, is_name=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaning:
    """What becomes of text and numbers on their way out of a file; a number that comes back as None is left out."""

    prose: Callable[[str], str]
    line: Callable[[str, int], str]
    name: Callable[[str, int], str]
    number: Callable[[float], float | None]


AS_IT_IS = Cleaning(
    prose=lambda text: text, line=lambda text, _: text, name=lambda text, _: text, number=lambda number: number
)


class NewerVersion(ArtifactError):
    """A file that was written by a newer version of this program."""


def to_json(record: Any) -> dict[str, Any]:
    """The record as plain data, keys in the order of its fields."""
    return {
        field.metadata.get(KEY, field.name): _plain(getattr(record, field.name))
        for field in dataclasses.fields(record)
        if getattr(record, field.name) or field.metadata != LEFT_OUT_IF_EMPTY
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(path: Path, record: Any, *, durable: bool = True) -> None:
    """Writes the record by one rename (``write_json`` says what ``durable`` means)."""
    write_json(path, to_json(record), durable=durable)


def read(path: Path, kind: type[Record], *, remedy: str) -> Record:
    """The record in a file. Raises FileNotFoundError: there is no such file; NewerVersion: it was written by a newer
    version of this program; ArtifactError: it cannot be read, or a field has another form; says which, with ``remedy``
    behind it."""
    return strict(_content(path, kind, remedy), kind, where=str(path), remedy=remedy)


def strict(raw: Any, kind: type[Record], *, where: str, remedy: str) -> Record:
    """The record in plain data; ``where`` names it in errors. Raises NewerVersion: it was written by a newer version of
    this program; ArtifactError: it is not an object, or a field has another form; says which, with ``remedy`` behind
    it."""
    if not isinstance(raw, dict):
        raise ArtifactError("unreadable: it contains no JSON object", where=where, remedy=remedy)
    _refuse_newer(raw, kind, where)
    reader = _Reader(AS_IT_IS)
    record: Record = reader.record(raw, kind, "")
    if reader.faults:
        raise ArtifactError(f"unreadable: {reader.faults[0]}", where=where, remedy=remedy)
    return record


def read_parts(path: Path, kind: type[Record], cleaning: Cleaning, *, remedy: str = "") -> Record | None:
    """As much of the record in a file as has its form, cleaned; None where a field that has no default has not. Raises
    FileNotFoundError, NewerVersion, ArtifactError: as ``read``, but not for a field of another form."""
    return parts(_content(path, kind, remedy), kind, cleaning)


def parts(raw: Any, kind: type[Record], cleaning: Cleaning = AS_IT_IS) -> Record | None:
    """As much of the record in plain data as has its form, cleaned; None where a field that has no default has not."""
    record = _Reader(cleaning).record(raw, kind, "")
    return None if record is _ABSENT else cast(Record, record)


def lines(file: Path, kind: type[Record]) -> Iterator[Record]:
    """As much of the record in each line of a file as has its form; empty without the file. Raises ValueError: a line
    is not JSON."""
    # Not by splitlines(), which also splits at U+2028 and the like, which answers may contain.
    texts = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    records = (parts(parse_json(text), kind) for text in texts if text)
    return (record for record in records if record is not None)


def _content(path: Path, kind: type[Any], remedy: str) -> dict[str, Any]:
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"unreadable: {error}", where=str(path), remedy=remedy) from error
    if not isinstance(raw, dict):
        raise ArtifactError("unreadable: it contains no JSON object", where=str(path), remedy=remedy)
    _refuse_newer(raw, kind, str(path))
    return raw


def _refuse_newer(raw: dict[str, Any], kind: type[Any], where: str) -> None:
    known = next((field.default for field in dataclasses.fields(kind) if field.name == VERSION), None)
    version = raw.get(VERSION, known)
    if isinstance(version, int) and isinstance(known, int) and version > known:
        raise NewerVersion(
            f"has format version {version}, but this program reads only versions up to {known}",
            where=where,
            remedy="update this program, or use the version that wrote the file",
        )


class _Reader:
    """Turns plain data into records and collects what has another form: ``arms[1].label: 3 is not text``."""

    def __init__(self, cleaning: Cleaning) -> None:
        self.faults: list[str] = []
        self._cleaning = cleaning

    def record(self, raw: Any, kind: Any, where: str) -> Any:
        if not isinstance(raw, dict):
            return self._misfit(raw, "an object", where)
        values, hints = {}, _hints(kind)
        for field in dataclasses.fields(kind):
            key = field.metadata.get(KEY, field.name)
            inside = f"{where}.{key}" if where else key
            value = self._value(raw[key], hints[field.name], inside) if key in raw else _ABSENT
            if value is not _ABSENT:
                values[field.name] = value
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                if key not in raw:
                    self.faults.append(f"{inside} is missing")
                return _ABSENT
        return kind(**values)

    def _value(self, raw: Any, hint: Any, where: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return raw
        if origin in (Union, types.UnionType):
            return self._one_of(raw, arguments, where)
        if origin is list:
            return self._list(raw, arguments[0], where)
        if origin is dict:
            return self._dict(raw, arguments, where)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.record(raw, hint, where)
        line = next((mark for mark in arguments if isinstance(mark, Line)), None)
        return self._scalar(raw, arguments[0] if origin is Annotated else hint, line, where)

    def _one_of(self, raw: Any, hints: tuple[Any, ...], where: str) -> Any:
        if raw is None and type(None) in hints:
            return None
        others = [hint for hint in hints if hint is not type(None)]
        value = self._value(raw, next((hint for hint in others if _begins_as(raw, hint)), others[0]), where)
        return None if value is _ABSENT and type(None) in hints else value

    def _list(self, raw: Any, hint: Any, where: str) -> Any:
        if not isinstance(raw, list):
            return self._misfit(raw, "a list", where)
        values = [self._value(item, hint, f"{where}[{index}]") for index, item in enumerate(raw)]
        if hint in (int, float) and _ABSENT in values:  # numbers mean something by their places
            return _ABSENT
        return [value for value in values if value is not _ABSENT]

    def _dict(self, raw: Any, hints: tuple[Any, ...], where: str) -> Any:
        if not isinstance(raw, dict):
            return self._misfit(raw, "an object", where)
        key_hint, hint = hints
        values = {
            self._value(key, key_hint, where): self._value(item, hint, f"{where}.{key}") for key, item in raw.items()
        }
        return {key: value for key, value in values.items() if value is not _ABSENT}

    def _scalar(self, raw: Any, kind: type[Any], line: Line | None, where: str) -> Any:
        if not _is_a(raw, kind):
            return self._misfit(raw, _WORDS[kind], where)
        if kind is str:
            return self._cleaning.prose(raw) if line is None else self._one_line(raw, line)
        if kind is bool:
            return raw
        number = self._cleaning.number(float(raw) if kind is float else raw)
        return _ABSENT if number is None else number

    def _one_line(self, raw: str, line: Line) -> str:
        clean = self._cleaning.name if line.is_name else self._cleaning.line
        return clean(raw, line.limit)

    def _misfit(self, raw: Any, expected: str, where: str) -> Any:
        self.faults.append(f"{where}: {raw!r:.60} is not {expected}" if where else f"{raw!r:.60} is not {expected}")
        return _ABSENT


def _begins_as(raw: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (list, dict):
        return isinstance(raw, origin)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return isinstance(raw, dict)
    return _is_a(raw, get_args(hint)[0] if origin is Annotated else hint)


def _is_a(raw: Any, kind: type[Any]) -> bool:
    if isinstance(raw, bool) or kind is bool:
        return isinstance(raw, bool) and kind is bool
    if kind is float:
        return isinstance(raw, float) or (isinstance(raw, int) and abs(raw) < _LARGEST)
    return isinstance(raw, kind)


_LARGEST = 1 << 1023
"""A whole number beyond this has no float."""


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
