"""Where rows come from: a file that ships with the project, or one of the user's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from alignment.config.near import suggestion
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair, Prompt
from alignment.errors import DataError
from alignment.resources import shipped


class _Record(Protocol):
    @classmethod
    def from_row(cls, row: Any, *, where: str) -> Any: ...


R = TypeVar("R", bound=_Record)

RECORDS: dict[str, type[Conversation] | type[PreferencePair] | type[Prompt] | type[HeldOutPrompt]] = {
    "sft": Conversation,
    "reward": PreferencePair,
    "dpo": PreferencePair,
    "ppo": Prompt,
    "evaluate": HeldOutPrompt,
}
"""What each kind of stage reads."""


def locate(source: str, *, where: str = "") -> Path:
    """The file behind ``bundled:quickstart/NAME`` or ``path:FILE.jsonl``.

    Raises:
        DataError: no such form, name or file.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "path" and rest:
        path = Path(rest).expanduser().absolute()
        if not path.is_file():
            raise DataError(f"no file {path}", where=where, remedy="give a JSON Lines file, one object a line")
        return path
    if scheme == "bundled" and rest:
        return _bundled(rest, where=where)
    raise DataError(
        f"{source!r} is no data source", where=where, remedy="write bundled:quickstart/NAME or path:FILE.jsonl"
    )


def read_jsonl(path: Path, record: type[R], *, limit: int | None = None) -> Iterator[R]:
    """The file's rows as records, in order, at most ``limit``; blank lines are passed over.

    Raises:
        DataError: names file and line of the first row that does not parse or does not fit.
    """
    taken = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if taken == limit:
                return
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield record.from_row(_parse(line, where=where), where=where)
            taken += 1
    if taken == 0:
        raise DataError("holds no row", where=str(path), remedy="give a JSON Lines file, one object a line")


def _parse(line: bytes, *, where: str) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error.reason}", where=where, remedy="save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=where, remedy="one JSON object a line (JSON Lines)") from error


def _bundled(name: str, *, where: str) -> Path:
    folder = shipped("data")
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.jsonl"))
    if name not in names:
        raise DataError(f"no bundled data '{name}'", where=where, remedy=suggestion(name, names))
    return folder / f"{name}.jsonl"
