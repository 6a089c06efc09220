"""How fast a stage proceeds, and how long the rest of it takes."""

from __future__ import annotations

from collections.abc import Callable

from alignment.records.worker import Progress

Clock = Callable[[], float]
"""Seconds that only go up."""


class Pace:
    """Estimates how long a stage's remaining steps take, from all steps since it was first seen.

    A window of seconds would not contain two steps of PPO, whose update and sampling take minutes. Phases that count
    the same steps, such as sampling and training, share an estimate.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._has_begun = False
        self._total: int | None = None
        self._first = self._latest = 0
        self._began = self._reached = 0.0

    def see(self, progress: Progress, *, first: int | None = None, seconds: float = 0.0) -> None:
        """Records the stage's progress now.

        For somebody who begins to watch later, ``first`` is an earlier step, which was done ``seconds`` before this
        one. It is used only where a new count of steps begins.
        """
        now = self._clock()
        if not self._has_begun or progress.total != self._total or progress.step < self._latest:
            self._has_begun = True
            self._total, self._first, self._began = progress.total, progress.step, now
            if first is not None and first < progress.step:
                self._first, self._began = first, now - seconds
            self._latest, self._reached = progress.step, now
        elif progress.step > self._latest:
            self._latest, self._reached = progress.step, now

    def left(self) -> float | None:
        """Seconds, or None before a step has been timed and after the last one."""
        done = self._latest - self._first
        if not self._total or not done or self._latest >= self._total:
            return None
        seconds = (self._total - self._latest) * (self._reached - self._began) / done
        return max(0.0, seconds - (self._clock() - self._reached))

    def per_second(self) -> float:
        """Steps a second; 0 before a step has been timed."""
        seconds = self._reached - self._began
        return (self._latest - self._first) / seconds if seconds > 0 else 0.0
