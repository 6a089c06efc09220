"""What servers answered, saved at once: a stage that was killed asks only for the rest when it is started again.

The form is JSON Lines, ``{"key": …, "value": …}``. A line that was cut off by a kill is skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.core.files import parse_json

log = logging.getLogger(__name__)


class SavedReplies:
    """Replies by the key of what was asked.

    New ones are appended to ``file``, which no other process may write; those in the files ``others`` are known too.
    """

    def __init__(self, file: Path, others: Sequence[Path] = ()) -> None:
        self._file = file
        self._known = {key: value for each in (*others, file) for key, value in _lines(each)}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def save(self, key: str, value: Any) -> None:
        """Adds a reply. Called by one thread only.

        A line starts with its line break, since the line before may have been cut off.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"key": key, "value": value}))
        self._known[key] = value


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        return
    for line in filter(None, file.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = parse_json(line)
            yield record["key"], record["value"]
        except (ValueError, KeyError, TypeError):
            log.warning("a line of %s cannot be read; its reply will be requested again", file)
