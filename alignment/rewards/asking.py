"""How a stage's scorers ask servers: where replies are saved, by which process, and who learns of the progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alignment.evaluation.saved_replies import SavedReplies


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What the scorers of a process share.

    ``replies`` are those that all attempts of the stage got. ``where`` is the stage's key. ``progress`` is called with
    each reply, so that a process that waits for a slow server does not count as stuck.
    """

    replies: SavedReplies
    where: str
    progress: Callable[[], None]
