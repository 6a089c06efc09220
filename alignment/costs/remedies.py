"""The settings with which a stage fits into memory, and no setting more, in few estimates. Settings are tried in the
order of what they cost. As a rule each frees memory, so what does not fit with some of them is not tried with fewer.
What is proposed was estimated, also without each of its settings."""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.records.cost import PhaseCost, StageCost

Levels = tuple[int, ...]
"""How far each choice is taken: 0 leaves the setting as it is, 1 is its first value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A setting that frees memory and trains the same weights: its field in the stage's settings, such as
    ``optim.micro_batch_tokens``, and its values from the one that costs least. If it ``drops_copy``, it frees a copy of
    the weights, else only activations."""

    field: str
    values: tuple[int | bool, ...]
    drops_copy: bool = False

    def override(self, stage: str, level: int) -> str:
        """As the user writes it."""
        return f"stages.{stage}.{self.field}={json.dumps(self.values[level - 1])}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A way of training a stage: the ``overrides`` that choose it, none for the user's own, its stage file, and the
    choices that it leaves, from the one that costs least."""

    overrides: tuple[str, ...]
    file: str
    choices: tuple[Choice, ...]

    def settings(self, levels: Levels) -> dict[str, int | bool]:
        """The values of the choices that are taken, by their fields."""
        taken = zip(self.choices, levels, strict=True)
        return {choice.field: choice.values[level - 1] for choice, level in taken if level}

    def all_overrides(self, stage: str, levels: Levels) -> list[str]:
        """Of the choices that are taken, and of the way."""
        taken = zip(self.choices, levels, strict=True)
        return [*(choice.override(stage, level) for choice, level in taken if level), *self.overrides]

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Way:
        """From a file."""
        choices = (Choice(**{**choice, "values": tuple(choice["values"])}) for choice in plain["choices"])
        return Way(overrides=tuple(plain["overrides"]), file=plain["file"], choices=tuple(choices))


Estimate = Callable[[Way, Mapping[str, int | bool]], StageCost]
"""Estimates a stage in a way of training it, with these values of its choices."""


def with_remedy(cost: StageCost, ways: Sequence[Way], memory: float, estimate: Estimate) -> StageCost:
    """The cost, with the settings that cost least of those with which the stage fits into ``memory`` bytes. The first
    way is the stage's own, and each costs more than the one before. A cost that fits, or has an error, is returned as
    it is."""
    if cost.error or cost.peak <= memory:
        return cost
    every = [_Trials(way, memory, estimate, own=None if way.overrides else cost) for way in ways]
    for trials in every:
        levels = cheapest(trials.depths, trials.fits)
        if levels is None:
            continue
        same = every[0].levels_of(trials.way.settings(levels))
        if trials is not every[0] and every[0].fits(same):  # the way is not needed
            trials, levels = every[0], needed(same, every[0].fits)
        remedy = trials.way.all_overrides(cost.stage, levels)
        return replace(cost, remedy=remedy, remedy_peak=trials.costs[levels].peak)
    return cost


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """The settings of a stage, some of them with other values: ``{"optim.micro_batch_tokens": 512}``."""
    for field, value in settings.items():
        name, _, inner = field.partition(".")
        changed = with_settings(getattr(config, name), {inner: value}) if inner else value
        config = replace(config, **{name: changed})
    return config


def cheapest(depths: Sequence[int], fits: Callable[[Levels], bool]) -> Levels | None:
    """The levels that cost least of those that fit, if each choice can be taken as far as its depth; None if none fit.
    A choice costs more than all choices before it together. ``fits`` is first asked about no choice at all, and never
    twice about the same levels."""
    fits = functools.cache(fits)
    levels = [0] * len(depths)
    last = -1  # the choice that costs most of those that are needed
    while not fits(tuple(levels)):
        last += 1
        if last == len(depths):
            return None
        levels[last] = depths[last]
    for choice in range(last, -1, -1):

        def is_enough(level: int, choice: int = choice) -> bool:
            return fits((*levels[:choice], level, *levels[choice + 1 :]))

        levels[choice] = bisect_left(range(depths[choice]), True, key=is_enough)
    return needed(tuple(levels), fits)


def needed(levels: Levels, fits: Callable[[Levels], bool]) -> Levels:
    """Levels that fit, without each choice that is not needed. A choice may free nothing, or even take memory: of
    several micro-batches the first one's gradients are there beside the activations of the next."""
    for choice in range(len(levels) - 1, -1, -1):
        fewer = (*levels[:choice], 0, *levels[choice + 1 :])
        if levels[choice] and fits(fewer):
            return needed(fewer, fits)
    return levels


class _Trials:
    def __init__(self, way: Way, memory: float, estimate: Estimate, *, own: StageCost | None) -> None:
        self.way = way
        self._memory = memory
        self._estimate = estimate
        self._none: Levels = (0,) * len(way.choices)
        self.costs: dict[Levels, StageCost] = {} if own is None else {self._none: own}

    @property
    def depths(self) -> list[int]:
        return [len(choice.values) for choice in self.way.choices]

    def levels_of(self, settings: Mapping[str, int | bool]) -> Levels:
        return tuple(
            choice.values.index(settings[choice.field]) + 1 if choice.field in settings else 0
            for choice in self.way.choices
        )

    def fits(self, levels: Levels) -> bool:
        if levels != self._none and self._least(levels) > self._memory:
            return False
        if levels not in self.costs:
            self.costs[levels] = self._estimate(self.way, self.way.settings(levels))
        cost = self.costs[levels]
        return not cost.error and cost.peak <= self._memory

    def _least(self, levels: Levels) -> float:
        """Bytes that the stage needs at these levels, however few its activations become."""
        cost = self.costs[self._none]
        if cost.error:
            return math.inf  # other settings would not mend it
        taken = zip(self.way.choices, levels, strict=True)
        without_copy = any(level and choice.drops_copy for choice, level in taken)
        return cost.fixed + max((_states(phase, without_copy) for phase in cost.phases.values()), default=0.0)


def _states(phase: PhaseCost, without_copy: bool) -> float:
    """Bytes of weights, gradients and the optimiser's moments, which are there at once in every step. A copy of the
    weights has at most as many as the weights themselves."""
    weights = phase.parts.get("weights", 0)
    others = phase.parts.get("gradients", 0) + phase.parts.get("optimiser", 0)
    return others + (weights / 2 if without_copy else weights)
