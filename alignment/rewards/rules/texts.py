"""Rules about the words of an answer: a pattern, its length, key facts, refusals."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
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


def regex(config: ScoreSourceConfig) -> Rule:
    """1 if the pattern occurs anywhere in the answer, else 0."""
    assert config.pattern is not None, "the plan refuses a regex without its pattern"
    pattern = re.compile(config.pattern)
    return Rule(score=lambda text, _: float(pattern.search(text) is not None))


def length(config: ScoreSourceConfig) -> Rule:
    """1 at ``target`` words, falling linearly to 0 at zero words and at twice as many."""
    target = config.target
    assert target is not None, "the plan refuses a length without its target"
    return Rule(score=lambda text, _: max(0.0, 1.0 - abs(len(divided(text)) - target) / target))


REFUSAL = Rule(score=lambda text, _: float(is_refusal(text)))
"""1 if the answer contains a phrase of alignment/evaluation/refusals.py, else 0."""


def facts_of(record: HasRow) -> list[list[str]]:
    """The wordings of each of a row's facts, as words with single spaces. Raises DataError: the row has no facts, or
    one that has no words."""
    facts = record.row.get(FACTS)
    wordings = [_wordings(fact) for fact in facts] if isinstance(facts, list) else []
    return wordings if wordings and all(wordings) else lacking(record, FACTS, _FACTS_EXAMPLE)


def fact_recall(text: str, facts: list[list[str]]) -> float:
    answer = f" {_words(text)} "
    contained = sum(any(f" {wording} " in answer for wording in fact) for fact in facts)
    return contained / len(facts)


KEY_FACTS = Rule(expected=facts_of, score=fact_recall)
"""The share of its row's ``facts`` that the answer contains (recall). A fact is a text, or a list of wordings of which
one is enough. It is contained if its words stand in the answer one after another, as whole words. Case, punctuation and
compatibility forms of characters (Unicode's NFKC) are ignored."""


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


def of_one_turn(rule: Rule, *, source: str, field: str) -> Rule:
    """The ``rule``, which reads a row's ``field``; it refuses rows of which an evaluation asks several turns."""

    def expected(record: HasRow) -> Any:
        if getattr(record, "later_turns", ()) and record.row.get(field) is not None:
            raise DataError(
                f"'{source}' compares every answer with the row's '{field}', but the row asks several turns",
                where=record.where,
                remedy="score such rows with a function, FILE.py:FUNCTION, which gets the conversation so far",
            )
        return rule.expected(record)

    return replace(rule, expected=expected)
