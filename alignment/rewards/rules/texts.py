"""Rules about the words of an answer: a pattern, its length, key facts, refusals."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from alignment.config.scoring import ScoreSourceConfig
from alignment.core.errors import DataError
from alignment.core.wording import divided, marks, unified
from alignment.data.records import HasRow
from alignment.evaluation.refusals import is_refusal
from alignment.rewards.rules.rule_kind import Rule, lacking

FACTS = "facts"
_FACTS_EXAMPLE = (
    'key_facts needs a list of texts, or of lists of wordings: {"facts": ["21 March", ["noon", "12 o\'clock"]]}'
)


@dataclass(frozen=True, slots=True)
class OfText:
    """A rule about the answer alone, by a function of its text."""

    of: Callable[[str], float]

    def expected(self, record: HasRow) -> None:
        """Rows say nothing about it."""

    def score(self, text: str, expected: None) -> float:
        """What the function gives."""
        return self.of(text)


def regex(config: ScoreSourceConfig) -> OfText:
    """1 if the pattern occurs anywhere in the answer, else 0."""
    assert config.pattern is not None, "the plan refuses a regex without its pattern"
    pattern = re.compile(config.pattern)
    return OfText(lambda text: float(pattern.search(text) is not None))


def length(config: ScoreSourceConfig) -> OfText:
    """1 at ``target`` words, falling linearly to 0 at zero words and at twice as many."""
    target = config.target
    assert target is not None, "the plan refuses a length without its target"
    return OfText(lambda text: max(0.0, 1.0 - abs(len(divided(text)) - target) / target))


REFUSAL = OfText(lambda text: float(is_refusal(text)))
"""1 if the answer contains a phrase of alignment/evaluation/refusals.py, else 0."""


class KeyFacts:
    """The share of its row's ``facts`` that the answer contains (recall). A fact is a text, or a list of wordings of
    which one is enough. It is contained if its words stand in the answer one after another, as whole words. Case,
    punctuation and compatibility forms of characters (Unicode's NFKC) are ignored."""

    def expected(self, record: HasRow) -> list[list[str]]:
        """The wordings of each fact, as words with single spaces. Raises DataError: the row has no facts, or one that
        has no words."""
        facts = record.row.get(FACTS)
        if not isinstance(facts, list) or not facts:
            lacking(record, FACTS, _FACTS_EXAMPLE)
        wordings = [_wordings(fact) for fact in facts]
        if not all(wordings):
            lacking(record, FACTS, _FACTS_EXAMPLE)
        return wordings

    def score(self, text: str, expected: list[list[str]]) -> float:
        """From 0 to 1."""
        answer = f" {_words(text)} "
        contained = sum(any(f" {wording} " in answer for wording in fact) for fact in expected)
        return contained / len(expected)


def _wordings(fact: Any) -> list[str]:
    texts = [fact] if isinstance(fact, str) else fact
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    wordings = [_words(text) for text in texts]
    return wordings if all(wordings) else []


def _words(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_word().findall(unified(folded)))


@cache
def _word() -> re.Pattern[str]:
    return re.compile(rf"\d+(?:[.,:]\d+)*|\w+(?:[{marks()}]+\w*)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class OfOneTurn:
    """A ``rule`` that reads a row's ``field``, and refuses rows of which an evaluation asks several turns."""

    rule: Rule
    source: str
    field: str

    def expected(self, record: HasRow) -> Any:
        """What the rule reads in a row. Raises DataError: the row lacks it, or asks several turns."""
        if getattr(record, "later_turns", ()) and record.row.get(self.field) is not None:
            raise DataError(
                f"'{self.source}' compares every answer with the row's '{self.field}', but the row asks several turns",
                where=record.where,
                remedy="score such rows with a function, FILE.py:FUNCTION, which gets the conversation so far",
            )
        return self.rule.expected(record)

    def score(self, text: str, expected: Any) -> float:
        """The rule's score."""
        return self.rule.score(text, expected)
