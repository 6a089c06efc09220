"""Answers end before the text at which a client lets them stop."""

from __future__ import annotations

from collections.abc import Sequence


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of ``stops`` in it."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


class StopCut:
    """Cuts a text that comes in pieces; what may be the beginning of a stop is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_ended = False

    def after(self, piece: str) -> str:
        """What is certain of the answer after this piece and was not returned before."""
        if self.has_ended:
            return ""
        text = self._held + piece
        before = before_stops(text, self._stops)
        if len(before) < len(text):
            self.has_ended, self._held = True, ""
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
