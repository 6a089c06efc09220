"""How the scorers of a running stage ask servers."""

from __future__ import annotations

from alignment.evaluation.saved_replies import SavedReplies
from alignment.rewards.asking import Asking
from alignment.training.context import StageContext

REPLIES = "scorer_replies"
"""A folder in the stage's work folder, which a stage that is started again finds."""


def asking_of(context: StageContext) -> Asking:
    """Saves replies in the work folder of the stage, and reports each as progress.

    Each process writes a file of its own and has read those of all, since their number may have changed.
    """
    folder = context.spec.work / REPLIES

    def progress() -> None:
        context.heartbeat.reports += 1

    return Asking(
        replies=SavedReplies(folder / f"{context.rank}.jsonl", sorted(folder.glob("*.jsonl"))),
        where=f"stages.{context.spec.stage}",
        progress=progress,
    )
