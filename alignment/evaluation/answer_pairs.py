"""Pairs of answers for people to judge, and how far people agree."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.core.errors import ConfigError
from alignment.records.evaluation import Sample
from alignment.records.votes import pair_key


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPair:
    """The answers of two arms to one prompt, by arm; ``key`` is ``pair_key`` of the prompt and the answers. Example:
    ``AnswerPair(key="9f86…", messages=[{"role": "user", "content": "2 + 2?"}], answers={"stage:dpo": "4.", "stage:sft":
    "5."})``."""

    key: str
    messages: list[dict[str, Any]]
    answers: dict[str, str]
    id: str = ""
    task: str = ""

    @property
    def same(self) -> bool:
        first, second = self.answers.values()
        return first.strip() == second.strip()


def pair_of(messages: Sequence[Mapping[str, Any]], answers: Mapping[str, str], *, id: str, task: str) -> AnswerPair:
    turns = [dict(message) for message in messages]
    return AnswerPair(key=pair_key(turns, answers), messages=turns, answers=dict(answers), id=id, task=task)


def pairs_of_samples(samples: Iterable[Sample], arms: tuple[str, str]) -> list[AnswerPair]:
    """The pairs of an evaluation's first answers, in the order of its prompts; prompts that an arm did not answer are
    left out."""
    return [
        pair_of(sample.messages, {arm: sample.answers[arm].text for arm in arms}, id=sample.id, task=sample.task)
        for sample in samples
        if all(arm in sample.answers for arm in arms)
    ]


def queue(pairs: Iterable[AnswerPair]) -> list[AnswerPair]:
    """The pairs in the order in which people see them, each once, those with the same answer included. The order is
    that of their hashes. So it is random to the prompts, and the same for everybody: what was judged before somebody
    stopped is a random sample, and several annotators have the same pairs in common."""
    return sorted({pair.key: pair for pair in pairs}.values(), key=lambda pair: pair.key)


def shown_first(pair: AnswerPair, annotator: str) -> str:
    """The arm whose answer this annotator sees first: random over pairs and annotators, the same at every look."""
    drawn = hashlib.sha256(f"{pair.key}/{annotator}".encode()).digest()[0]
    return sorted(pair.answers)[drawn % 2]


PACKAGE = "krippendorff>=0.9,<0.10"


def krippendorff_alpha(points_of_prompts: Sequence[Sequence[float]]) -> float | None:
    """α for ordered values: 1 for full agreement, 0 for that of chance, below 0 for less. ``points_of_prompts`` has the
    votes on each prompt as points of one arm, from 0 to 1. None if no prompt has two votes, or if all votes on such
    prompts are the same, since then chance alone would agree on everything. Raises ConfigError: the library is not
    installed."""
    compared = [points for points in points_of_prompts if len(points) > 1]
    values = sorted({point for points in compared for point in points})
    if len(values) < 2:
        return None
    try:
        import krippendorff
        import numpy as np
    except ImportError:
        raise ConfigError(
            "the agreement between annotators needs the package krippendorff, which is not installed",
            where="judge.kind",
            remedy=f"pip install '{PACKAGE}'",
        ) from None
    # A row for each prompt, a column for each value: who gave a vote does not matter to α.
    counts = np.array([[points.count(value) for value in values] for points in compared])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return float(krippendorff.alpha(value_counts=counts, value_domain=values, level_of_measurement="ordinal"))
