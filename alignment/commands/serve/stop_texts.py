"""Answers end before the text at which a client lets them stop; transformers ends them behind it."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.cli.serving.utils import _StreamError


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of ``stops`` in it."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


class StopCut:
    """Cuts a text that comes in pieces; what may be the beginning of a stop is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._ended = False

    def after(self, piece: str) -> str:
        """What is certain of the answer after this piece and was not returned before."""
        if self._ended:
            return ""
        text = self._held + piece
        before = before_stops(text, self._stops)
        if len(before) < len(text):
            self._ended, self._held = True, ""
            return before
        certain = len(text) - self._beginning_of_a_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_a_stop(self, text: str) -> int:
        """The length of the longest end of ``text`` with which a stop begins."""
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((size for size in lengths if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


class CutQueue:
    """What a queue of transformers holds of a streamed answer, up to a stop. Texts of errors fit into JSON strings."""

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self._queue = queue
        self._cut = StopCut(stops)
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """The next piece; None is the end."""
        while not self._ready:
            self._ready.extend(self._changed(await self._queue.get()))
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The next piece.

        Raises:
            QueueEmpty: there is none yet.
        """
        while not self._ready:
            self._ready.extend(self._changed(self._queue.get_nowait()))
        return self._ready.popleft()

    def _changed(self, item: Any) -> list[Any]:
        if item is None:
            rest = self._cut.rest()
            return [rest, None] if rest else [None]
        if isinstance(item, _StreamError):
            return [_StreamError(json.dumps(item.msg)[1:-1])]
        if type(item) is str:  # its subclasses are thoughts
            piece = self._cut.after(item)
            return [piece] if piece else []
        return [item]
