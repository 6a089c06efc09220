"""The median rule of pruning, by a trial's latest values instead of its best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

SMOOTHED = 5
"""Number of a curve's last values that are averaged, because a batch's loss is noisy."""
_ROUNDING = 1e-3
"""Relative difference that two trials may have before they have learned anything."""


class LatestMedian(BasePruner):  # type: ignore[misc]  # optuna has no types here
    """Prunes a trial whose smoothed curve is worse at its last step than the median of finished trials at that step.

    Optuna's MedianPruner uses a trial's best value so far. DPO starts at a loss of ln 2 for all settings, and reward
    models start near it, so a trial that becomes worse than its start would never be pruned.
    """

    def __init__(self, *, startup_trials: int, warmup_steps: int) -> None:
        self._startup_trials = startup_trials
        self._warmup_steps = warmup_steps

    def prune(self, study: Study, trial: Any) -> bool:
        """Whether the trial should be stopped at the last step that it reported."""
        step = trial.last_step
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if step is None or step < self._warmup_steps or len(finished) < self._startup_trials:
            return False
        if len(trial.intermediate_values) < 2:
            return False  # the first value is that of an untrained model
        others = [value for other in finished if (value := smoothed(other.intermediate_values, step)) is not None]
        own = smoothed(trial.intermediate_values, step)
        if own is None or not others:
            return False
        middle = median(others)
        worse = own > middle if study.direction == StudyDirection.MINIMIZE else own < middle
        return worse and not math.isclose(own, middle, rel_tol=_ROUNDING)


def smoothed(values: Mapping[int, float], step: int) -> float | None:
    """The mean of the last ``SMOOTHED`` values up to a step; None if the curve ends before it or begins after it."""
    reached = sorted(reported for reported in values if reported <= step)
    if not reached or max(values) < step:
        return None
    return fmean(values[last] for last in reached[-SMOOTHED:])
