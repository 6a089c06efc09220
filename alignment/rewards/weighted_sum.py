"""Several scorers as one reward: each score is normalised and clipped if configured, then summed by weight. The scores
of an ensemble's members are combined before that sum. Each member keeps a column of its own in ``Scores``, because a
running normalisation needs the scores of the whole batch, and people want to see who disagrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.algos.preferences import spread
from alignment.data.records import Prompt
from alignment.data.tokens.tokenizer import generated_text
from alignment.rewards.scorer_sources import label
from alignment.rewards.scorers import Answers, Scorer, Scores, refuse_unusable

_FLAT = 1e-6
"""A deviation below this share of the mean is float32 rounding: such scores count as all equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A scorer and how its scores enter the total; ``source`` names the scorer in errors."""

    source: str
    scorer: Scorer
    weight: float = 1.0
    normalize: bool = False
    clip: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ensemble:
    """Several scorers that enter the total as one; the weights of ``members`` do not count. ``combine`` turns the
    normalised and clipped scores of the members, ``[members, answers]``, into ``[answers]``. These are then normalised
    and clipped like those of one scorer."""

    source: str
    members: Sequence[Part]
    combine: Callable[[Tensor], Tensor]
    weight: float = 1.0
    normalize: bool = False
    clip: float | None = None


@dataclass(eq=False)
class RunningMoments:
    """Running mean and deviation, updated batch by batch (Welford 1962; Chan et al. 1979, eq. 1.5). ``squares`` is the
    sum of squared distances from the mean."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def take_in(self, values: Tensor) -> None:
        number = values.numel()
        if number == 0:
            return
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        apart, total = mean - self.mean, self.count + number
        self.squares += squares + apart**2 * self.count * number / total
        self.mean += apart * number / total
        self.count = total

    def normalised(self, values: Tensor) -> Tensor:
        """``(values − mean) / deviation``; only ``values − mean`` before the first batch or if all were equal."""
        deviation = math.sqrt(self.squares / self.count) if self.count else 0.0
        flat = deviation <= _FLAT * abs(self.mean)
        return (values - self.mean) / (1.0 if flat else deviation)


class RewardMix:
    """The reward slot of a stage (``Rewards`` in scorers.py). ``tokenizer`` is the policy's; ``prompts`` are all rows
    of the stage's data, by index."""

    def __init__(self, parts: Sequence[Part | Ensemble], tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self._parts = dict(zip(_names([part.source for part in parts]), parts, strict=True))
        self._members = {name: _members(name, part) for name, part in self._parts.items() if isinstance(part, Ensemble)}
        self._tokenizer = tokenizer
        self._prompts = prompts
        every = [*self._parts.items(), *(item for members in self._members.values() for item in members.items())]
        self._moments = {name: RunningMoments() for name, part in every if part.normalize}
        self._columns: dict[str, Part] = {}
        for name, part in self._parts.items():
            self._columns |= {name: part} if isinstance(part, Part) else self._members[name]

    @property
    def names(self) -> list[str]:
        """Names of the scorers in metrics; a second one of the same name is ``NAME#2``. A member of an ensemble is
        ``ensemble/NAME``."""
        return list(self._columns)

    def scores(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], rows: Sequence[int]) -> Scores:
        """The score of each answer by each scorer; no scorer is called for a batch without answers."""
        if not answers:
            return Scores(names=tuple(self._columns), values=torch.empty(len(self._columns), 0))
        seen = Answers(
            prompt_ids=prompts,
            answer_ids=answers,
            texts=[generated_text(self._tokenizer, answer) for answer in answers],
            prompts=[self._prompts[row] for row in rows],
            rows=rows,
        )
        scores = {name: part.scorer.scores(seen) for name, part in self._columns.items()}
        for name, part in self._columns.items():
            refuse_unusable(scores[name], seen, source=part.source)
        return Scores.of({name: of_part.float() for name, of_part in scores.items()})

    def observe(self, scores: Scores) -> None:
        by_name = scores.by_name()
        for name in self._columns:
            self._take_in(name, by_name[name].double())
        for name in self._members:  # what is combined is normalised already
            self._take_in(name, self._combined(name, by_name))

    def total(self, scores: Scores) -> Tensor:
        """``[answers]``: the weighted sum of normalised and clipped scores, float32, computed in float64."""
        by_name = scores.by_name()
        summands = [part.weight * self._rescaled(name, self._own(name, by_name)) for name, part in self._parts.items()]
        return torch.stack(summands).sum(0).float()

    def of_ensembles(self, scores: Scores) -> dict[str, Tensor]:
        by_name, combined = scores.by_name(), {}
        for name in self._members:
            combined[name] = self._combined(name, by_name).float()
            combined[f"{name}_std"] = spread(self._of_members(name, by_name)).float()
        return combined

    def state(self) -> dict[str, Any]:
        return {name: asdict(moments) for name, moments in self._moments.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._moments = {name: RunningMoments(**state[name]) for name in self._moments}

    def _take_in(self, name: str, values: Tensor) -> None:
        if name in self._moments:
            self._moments[name].take_in(values)

    def _own(self, name: str, by_name: Mapping[str, Tensor]) -> Tensor:
        return self._combined(name, by_name) if name in self._members else by_name[name].double()

    def _combined(self, name: str, by_name: Mapping[str, Tensor]) -> Tensor:
        part = self._parts[name]
        assert isinstance(part, Ensemble)
        return part.combine(self._of_members(name, by_name))

    def _of_members(self, name: str, by_name: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self._rescaled(member, by_name[member].double()) for member in self._members[name]])

    def _rescaled(self, name: str, scores: Tensor) -> Tensor:
        part = self._parts.get(name) or self._columns[name]
        if part.normalize:
            scores = self._moments[name].normalised(scores)
        if part.clip is not None:
            scores = scores.clamp(-part.clip, part.clip)
        return scores


def _members(name: str, ensemble: Ensemble) -> dict[str, Part]:
    names = _names([member.source for member in ensemble.members])
    return {f"{name}/{own}": member for own, member in zip(names, ensemble.members, strict=True)}


def _names(sources: Sequence[str]) -> list[str]:
    """``["exact_answer", "regex", "regex"]`` → ``["exact_answer", "regex", "regex#2"]``."""
    labels = [label(source) for source in sources]
    return [
        name if (number := labels[: index + 1].count(name)) == 1 else f"{name}#{number}"
        for index, name in enumerate(labels)
    ]
