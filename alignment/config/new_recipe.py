"""What `align new` knows when it writes a recipe, and what kinds of stage propose for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COMMON = 0.99
"""The share of rows whose length counts, where a few are much longer (chosen, not tuned)."""
_NOT_ALL = 20
"""From so many rows, a single one that is much longer does not count either: less than 99 % of few rows is one row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reasoned:
    """A value of a recipe, and the comment that says why it is this one."""

    value: Any
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What only the user can decide. ``name`` is the option that answers it, ``--from-pairs``.

    ``choices`` are the answers and what each means; without any, every text is an answer."""

    name: str
    text: str
    choices: Mapping[str, str] = field(default_factory=dict)


FROM_PAIRS = Question(
    name="from-pairs",
    text="How should the model learn from pairs?",
    choices={
        "directly": "it learns to prefer the better answer of each pair: one stage, the cheaper way",
        "reward-model": "a reward model learns the preferences, then the policy maximises its score: two stages",
        "both": "both methods from the same start, to compare them",
    },
)
DIRECTLY, BY_REWARD_MODEL = ("directly", "both"), ("reward-model", "both")
"""Answers to ``FROM_PAIRS`` with which pairs are learned from directly, and with which a reward model learns."""
FIRST = Question(
    name="first",
    text="The files have no conversations, but they have better answers. Should the model learn those first?",
    choices={
        "learn": "yes, the model was not trained on answers like these (Rafailov et al. 2023, section 4)",
        "skip": "no, it already answers well",
    },
)
SCORER = Question(
    name="scorer",
    text="What scores the answers to prompts? FILE.py:FUNCTION, a rule such as exact_answer, or hub:REWARD_MODEL "
    "(for prompts that are only for evaluation, use --heldout FILE)",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Tokens of the records that were counted: of whole rows, of their prompts, and of their longest answers.

    ``remarks`` are sentences on records that the chat template cannot render, or of which it leaves something out."""

    rows: Sequence[int] = ()
    prompts: Sequence[int] = ()
    answers: Sequence[int] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The records that stages can make of data files.

    ``files`` are their names, ``settings`` those of a stage's ``data``. There are ``number`` records with ``prompts``
    different prompts."""

    files: Sequence[str]
    settings: Mapping[str, Any]
    number: int
    prompts: int
    lengths: Lengths = field(default_factory=Lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """All that a kind of stage may look at.

    ``rows`` are the user's by the type of their records, without those that are ``held_out``. ``answers`` are those to
    questions, by name. ``positions`` is the longest sequence that the model reads, and ``has_template`` says whether
    its tokenizer has a chat template of its own. ``start`` is what a stage should start from that learns from
    preferences or scores, ``made`` are the names of earlier stages by the kind of their artifact."""

    rows: Mapping[type, Rows]
    answers: Mapping[str, str] = field(default_factory=dict)
    positions: int
    has_template: bool
    held_out: Rows | None = None
    start: str = "base"
    made: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def answer(self, question: Question) -> str:
        """The answer to a question; empty if nobody was asked."""
        return self.answers.get(question.name, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class NewStage:
    """A stage for a new recipe: its settings, each plain, a group of further ones, or ``Reasoned``.

    ``why`` says what it is for. ``reads`` are the rows that it learns from or asks."""

    why: str
    settings: Mapping[str, Any]
    reads: Rows | None = None


def number_above(lengths: Sequence[int], limit: int) -> int:
    """How many lengths are greater than a limit."""
    return sum(length > limit for length in lengths)


def share_above(lengths: Sequence[int], limit: int) -> float:
    """The share of lengths that are greater than a limit."""
    return number_above(lengths, limit) / max(1, len(lengths))


def common_length(lengths: Sequence[int]) -> int:
    """The length that all but one in a hundred do not exceed, and from 20 lengths on all but one; or the greatest if it
    is at most twice that; 0 for no lengths."""
    ordered = sorted(lengths)
    if not ordered:
        return 0
    counting = int(COMMON * len(ordered) + 0.5)
    if len(ordered) >= _NOT_ALL:
        counting = min(counting, len(ordered) - 1)
    common = ordered[max(0, counting - 1)]
    return ordered[-1] if ordered[-1] <= 2 * common else common
