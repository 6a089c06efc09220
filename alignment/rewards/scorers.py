"""The input and output of scorers, checks of their scores, rules as scorers, and scores from scorers to advantages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alignment.config.rules import LARGEST
from alignment.core.errors import RewardError
from alignment.data.records import Prompt
from alignment.rewards.rules.rule_kind import Rule

_REMEDY = f"give one number per answer, from -{LARGEST:g} to {LARGEST:g}, in the answers' order"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """At least one answer to score, in every form that a scorer may read: token ids, text, and the row of its prompt.
    ``texts`` have no special tokens. ``rows`` are the indices of the prompts in the stage's data. Example:
    ``Answers(prompt_ids=[[1, 5]], answer_ids=[[7, 2]], texts=["Hi."], prompts=[Prompt(…)], rows=[12])``."""

    prompt_ids: Sequence[Sequence[int]]
    answer_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    prompts: Sequence[Prompt]
    rows: Sequence[int]

    def parts(self, size: int) -> Iterator[Answers]:
        """The answers in order, in parts of at most ``size``."""
        for start in range(0, len(self.texts), size):
            some = slice(start, start + size)
            yield Answers(**{field.name: getattr(self, field.name)[some] for field in fields(self)})

    def locations(self) -> str:
        return locations_of(self.prompts)


def locations_of(prompts: Sequence[Prompt]) -> str:
    """Files and lines of prompts, the first three of them: ``a.jsonl:1, a.jsonl:7 and 2 more``."""
    different = list(dict.fromkeys(prompt.where for prompt in prompts))
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(different[:3]) + more


class Scorer(Protocol):
    """One source of scores."""

    def scores(self, answers: Answers) -> Tensor:
        """``[answers]`` on the CPU, in order: float32 from a model, float64 from a rule or a function."""


def refuse_unusable(scores: Tensor, answers: Answers, *, source: str) -> None:
    """Checks that all ``[answers]`` scores are within ±``LARGEST``. Raises RewardError: a score is not; names the
    scorer by its ``source``, the row and the value."""
    unusable = (~(scores.abs() <= LARGEST)).nonzero()  # NaN compares as false
    if len(unusable):
        index = int(unusable[0])
        _refuse_size(float(scores[index]), where=answers.prompts[index].where, source=source)


def scores_from(given: Any, answers: Answers, *, source: str) -> Tensor:
    """``[answers]`` float64 from the value that a user's function returned: a list of one number per answer. Raises
    RewardError: the value is anything else; names the function by its ``source``, the row and the value."""
    pairs = zip(_one_each(given, answers, source), answers.prompts, strict=True)
    scores = [checked_number(value, where=prompt.where, source=source) for value, prompt in pairs]
    return torch.tensor(scores, dtype=torch.float64)


def optional_scores_from(given: Any, answers: Answers, *, source: str) -> list[float | None]:
    """As ``scores_from``, but the list may have None for an answer, which then has no score."""
    return [
        None if value is None else checked_number(value, where=prompt.where, source=source)
        for value, prompt in zip(_one_each(given, answers, source), answers.prompts, strict=True)
    ]


def _one_each(given: Any, answers: Answers, source: str) -> Sequence[Any]:
    count = len(answers.texts)
    if not isinstance(given, (list, tuple)):
        raise _refused(f"gave a {type(given).__name__}: {given!r:.80}", source, f"give a list of {count} numbers")
    if len(given) != count:
        raise _refused(f"gave {len(given)} scores for {count} answers to {answers.locations()}", source)
    return given


def checked_number(value: Any, *, where: str, source: str) -> float:
    """The score of an answer to the row at ``where``, as the scorer ``source`` gave it; 1 for true and 0 for false.
    Raises RewardError: it is not a number within ±``LARGEST``."""
    if not isinstance(value, (Real, np.bool)):
        raise _refused(
            f"gave {value!r:.80} ({type(value).__name__}) for an answer to {where}, which is not a number", source
        )
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        number = math.inf
    _refuse_size(number, value, where=where, source=source)
    return number


def _refuse_size(number: float, written: object = None, *, where: str, source: str) -> None:
    """``written`` is the value as the function returned it, for the message."""
    shown = number if written is None else written
    if not math.isfinite(number):
        raise _refused(f"gave {shown!r:.80} for an answer to {where}, which is not finite", source)
    if abs(number) > LARGEST:
        raise _refused(f"gave {shown!r:.80} for an answer to {where}, which is outside ±{LARGEST:g}", source)


def _refused(problem: str, source: str, remedy: str = _REMEDY) -> RewardError:
    return RewardError(f"{problem}; none of these scores was used", where=source, remedy=remedy)


class RuleScorer:
    """Scores texts by a rule; ``prompts`` are all rows of the stage's data. Raises DataError: a row lacks what the rule
    reads."""

    def __init__(self, rule: Rule, prompts: Sequence[Prompt]) -> None:
        self._rule = rule
        self._expected = [rule.expected(prompt) for prompt in prompts]

    def scores(self, answers: Answers) -> Tensor:
        pairs = zip(answers.texts, answers.rows, strict=True)
        return torch.tensor([self._rule.score(text, self._expected[row]) for text, row in pairs], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The score of each answer by each scorer. ``values`` is ``[scorers, answers]`` float32, one row for each of
    ``names``. Example: ``Scores(names=("regex", "length"), values=torch.tensor([[1.0, 0.0, 1.0], [0.5, 0.25,
    1.0]]))``."""

    names: tuple[str, ...]
    values: Tensor

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Scores:
        return cls(names=tuple(named), values=torch.stack(list(named.values())).float())

    def by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def of_answer(self, index: int) -> dict[str, float]:
        return dict(zip(self.names, self.values[:, index].tolist(), strict=True))


def gathered_scores(shares: Sequence[Scores], order: Sequence[tuple[int, int]]) -> Scores:
    """Scores of a whole batch from its shares; ``order`` gives the share of each answer and its index there."""
    values = torch.stack([shares[share].values[:, index] for share, index in order], dim=1)
    return Scores(names=shares[0].names, values=values)


class Rewards(Protocol):
    """One or more scorers, and how their scores are combined (``RewardMix``). Each process scores its own share of a
    rollout batch with ``scores``. Once the shares of all processes are gathered, ``total`` gives each answer one score,
    the same on every process."""

    def scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Scores:
        """The score of each answer by each scorer, on the CPU. ``prompts`` and ``answers`` are token ids of the
        policy's tokenizer, answers with the end token if it was sampled. ``rows`` are the indices of the prompts in the
        stage's data. Raises RewardError: a scorer did not give one usable number per answer."""

    def observe(self, scores: Scores) -> None:
        """Updates the running normalisation with the scores of a whole batch, before its ``total``."""

    def total(self, scores: Scores) -> Tensor:
        """``[answers]`` float32: the weighted sum of normalised and clipped scores."""

    def of_ensembles(self, scores: Scores) -> dict[str, Tensor]:
        """``[answers]`` of each ensemble, for metrics: its combined score, ``ensemble``, and how far its members are
        apart, ``ensemble_std``."""

    def state(self) -> dict[str, Any]:
        """The state to save in a checkpoint, as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state`` returned."""
