"""The median rule of pruning, by where a trial stands and not by the best that it ever had."""

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
"""Values of a curve whose mean says where it stands: a batch's loss is noisy."""
_ROUNDING = 1e-3
"""Share of a value by which two trials may differ that have learned nothing yet."""


class LatestMedian(BasePruner):  # type: ignore[misc]  # optuna has no types here
    """Prunes a trial whose curve, smoothed, is worse at its last step than the median of finished ones at that step.

    Optuna's own MedianPruner takes a trial's best value so far. DPO begins at a loss of ln 2 whatever its settings, and
    reward models near it, so a trial that gets worse than it began would never be pruned.
    """

    def __init__(self, *, startup_trials: int, warmup_steps: int) -> None:
        self._startup_trials = startup_trials
        self._warmup_steps = warmup_steps

    def prune(self, study: Study, trial: Any) -> bool:
        """Whether the trial ought to be stopped at the last step that it reported."""
        step = trial.last_step
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if step is None or step < self._warmup_steps or len(finished) < self._startup_trials:
            return False
        if len(trial.intermediate_values) < 2:
            return False  # the first value is of a model that has not learned anything yet
        others = [value for one in finished if (value := smoothed(one.intermediate_values, step)) is not None]
        own = smoothed(trial.intermediate_values, step)
        if own is None or not others:
            return False
        middle = median(others)
        worse = own > middle if study.direction == StudyDirection.MINIMIZE else own < middle
        return worse and not math.isclose(own, middle, rel_tol=_ROUNDING)


def smoothed(values: Mapping[int, float], step: int) -> float | None:
    """The mean of the last ``SMOOTHED`` values up to a step; None of a curve that ends before it or begins after it."""
    reached = sorted(one for one in values if one <= step)
    if not reached or max(values) < step:
        return None
    return fmean(values[one] for one in reached[-SMOOTHED:])
