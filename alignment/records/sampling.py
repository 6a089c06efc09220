"""``sampling.json``: how many answers a stage sampled, what became of them, and what their scores are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alignment.core import typed_json
from alignment.core.typed_json import Name

FILE = "sampling.json"
COUNTS = (
    "prompts",
    "answers",
    "rows",
    "rows_too_long",
    "prompts_evaluated",
    "prompts_repeated",
    "prompts_without_row",
    "prompts_tied",
    "answers_repeated",
    "answers_empty",
    "answers_without_end",
)
"""The fields of the record that are also counts in the manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """The mean score of the best of ``answers`` to a prompt; it is within ``kl_bound`` nats of the policy."""

    answers: int
    score: float
    kl_bound: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Counts of a stage that samples answers.

    ``prompts`` counts the prompts that were asked. Prompts that are too long, that are also evaluated, or that were
    asked already were left out before. ``rows`` were made of the answers, except answers that repeat another one, are
    empty or have no end. A prompt is ``tied`` if it has several usable answers and all of them have the same score.
    """

    select: Name
    prompts: int
    answers: int
    rows: int
    rows_too_long: int = 0
    prompts_evaluated: int = 0
    prompts_repeated: int = 0
    prompts_without_row: int = 0
    prompts_tied: int = 0
    answers_repeated: int = 0
    answers_empty: int = 0
    answers_without_end: int = 0
    best_of: list[BestOf] = field(default_factory=list)
    version: int = 1

    def write(self, folder: Path) -> None:
        """Writes the file into an artifact's folder."""
        typed_json.write(folder / FILE, self)

    @staticmethod
    def read(artifact: Path) -> Sampling:
        """The record of an artifact.

        Raises:
            FileNotFoundError: the artifact has none.
            ArtifactError: it is damaged, or was written by a newer version.
        """
        return typed_json.read(artifact / FILE, Sampling, remedy=f"delete {artifact} to remake it")
