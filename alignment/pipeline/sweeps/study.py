"""Optuna's study of a sweep, which proposes settings and records results in a journal of lines beside the trials."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from optuna import Study as OptunaStudy
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import TrialState

from alignment.config.rules import NAME, is_name
from alignment.config.sweep import ParameterConfig, Pruner, Search
from alignment.core.errors import ConfigError
from alignment.core.files import cut_unfinished_line
from alignment.pipeline.sweeps.sweep_file import Sweep
from alignment.records.interval import Interval

SMOOTHED = 5
"""Number of a curve's last values that are averaged, because a batch's loss is noisy."""
_ROUNDING = 1e-3
"""Relative difference that two trials may have before they have learned anything."""


class LatestMedian(BasePruner):  # type: ignore[misc]  # optuna has no types here
    """Prunes a trial whose smoothed curve is worse at its last step than the median of finished trials at that step.
    Optuna's MedianPruner uses a trial's best value so far. DPO starts at a loss of ln 2 for all settings, and reward
    models start near it, so a trial that becomes worse than its start would never be pruned."""

    def __init__(self, *, startup_trials: int, warmup_steps: int) -> None:
        self._startup_trials, self._warmup_steps = startup_trials, warmup_steps

    def prune(self, study: OptunaStudy, trial: Any) -> bool:
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


JOURNAL = "study.jsonl"
_RETRIED = "retried"
_MOST_RANDOM = 10
"""Number of random trials before TPE learns from them (optuna's default); fewer in a small sweep."""


class Study:
    """The study with this identity in the sweep's folder, or a new one. A trial is optuna's; its ``user_attrs`` hold
    its ``run`` and, after its end, its ``error``, ``pruned_at`` (a step), or its ``intervals``, ``artifacts`` and
    ``unmet`` gates. An interrupted trial is recorded as failed without an ``error``. It does not count, and is tried
    again under the same run name, so that its stages continue. The caller holds the sweep's lock. Raises ConfigError:
    names of runs would be too long, or optuna is not installed."""

    def __init__(self, wanted: Sweep) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        wanted.folder.mkdir(parents=True, exist_ok=True)
        self._journal = wanted.folder / JOURNAL
        cut_unfinished_line(self._journal)  # optuna would write behind it, and could then read neither line
        self._wanted = wanted
        self._states = optuna.trial.TrialState
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(self._journal)))
        study_name = f"{wanted.name}-{wanted.identity[:16]}"
        # Runs of later studies have other names, so that studies do not share runs.
        study_names = optuna.get_all_study_names(storage)
        is_first = not study_names or study_names[0] == study_name
        self._runs = _first_runs(wanted) + ("" if is_first else f".{wanted.identity[:8]}")
        _refuse_long_names(wanted, self._runs)
        pruning = wanted.config.pruning
        pruner = LatestMedian(startup_trials=pruning.startup_trials, warmup_steps=pruning.warmup_steps)
        if pruning.pruner is Pruner.none:
            pruner = optuna.pruners.NopPruner()
        self._study = optuna.create_study(
            study_name=study_name,
            storage=storage,
            directions=["minimize" if objective.minimize else "maximize" for objective in wanted.objectives],
            pruner=pruner,
            load_if_exists=True,
        )

    def retry_cut_off(self) -> None:
        """Queues the trials of a process that is gone again; call it while no trial runs."""
        for trial in self._study.get_trials(states=[self._states.RUNNING]):
            self.again(trial)

    def retry_failed(self) -> None:
        """Queues the trials that failed, under the same run names; call it while no trial runs."""
        failed = self.failed()
        self._study.set_user_attr(_RETRIED, [*self._retried, *(trial.number for trial in failed)])
        for trial in failed:
            self._study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs["run"]})

    def next(self) -> Any | None:
        """The next trial, or None if all are done or running."""
        config = self._wanted.config
        counted = [trial for trial in self._study.trials if not self._is_cut_off(trial)]
        if not any(trial.state is self._states.WAITING for trial in counted):
            if config.search is Search.tpe and len(counted) >= (config.trials or 0):
                return None
            if config.search is Search.grid:
                tried, keys = [trial.params for trial in counted], [parameter.key for parameter in config.parameters]
                products = itertools.product(*(parameter.values for parameter in config.parameters))
                grid = (dict(zip(keys, values, strict=True)) for values in products)
                combination = next((values for values in grid if values not in tried), None)
                if combination is None:
                    return None
                self._study.enqueue_trial(combination)
        number = sum("run" in trial.user_attrs for trial in counted)
        # Each trial has its own sampler, so that its draws do not depend on interruptions.
        self._study.sampler = _sampler(config.seed + number, config.trials or 0)
        trial = self._study.ask({parameter.key: _distribution(parameter) for parameter in config.parameters})
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", f"{self._runs}.{number}")
        return trial

    def again(self, trial: Any) -> None:
        """Records that the trial was interrupted, and queues it again. What interrupted it may be a full disk, which
        leaves half a line."""
        cut_unfinished_line(self._journal)
        self._study.tell(trial.number, state=self._states.FAIL)
        if "run" in trial.user_attrs:  # otherwise it was interrupted before it had a name and settings
            self._study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs["run"]})

    def complete(self, trial: Any, values: Sequence[Interval], artifacts: Sequence[Path], *, unmet: str) -> None:
        """Records a finished trial: a value and its artifact for each objective, and the gates that are not met."""
        trial.set_user_attr("unmet", unmet)
        trial.set_user_attr("artifacts", [str(artifact) for artifact in artifacts])
        trial.set_user_attr("intervals", [[value.low, value.high] for value in values])
        self._study.tell(trial, [value.mean for value in values])

    def fail(self, trial: Any, error: str) -> None:
        """Records a failed trial, which is only tried again by ``retry_failed``."""
        trial.set_user_attr("error", error)
        self._study.tell(trial, state=self._states.FAIL)

    def prune(self, trial: Any, step: int) -> None:
        """Records that the trial was pruned at a step."""
        trial.set_user_attr("pruned_at", step)
        self._study.tell(trial, state=self._states.PRUNED)

    def ended(self) -> list[Any]:
        """All done, failed and pruned trials, in order."""
        return [trial for trial in self._study.trials if trial.state.is_finished() and not self._is_cut_off(trial)]

    def completed(self) -> list[Any]:
        """The trials that have values."""
        return [trial for trial in self.ended() if trial.state is self._states.COMPLETE]

    def failed(self) -> list[Any]:
        """The trials that failed and were not queued again."""
        return [trial for trial in self.ended() if trial.state is self._states.FAIL]

    def best(self) -> list[int]:
        """Numbers of the best trial and of those that equal it, or of those in the Pareto set; empty until a trial is
        done."""
        done = self.completed()
        if len(self._wanted.objectives) > 1:
            done = self._study.best_trials if done else []
        elif done:
            best = self._study.best_value
            done = [trial for trial in done if math.isclose(trial.value, best, rel_tol=1e-9, abs_tol=1e-12)]
        return [number_of(trial) for trial in done]

    def importance(self, objective: int) -> dict[str, float]:
        """The share of each parameter in whether an objective is in its better half (Watanabe et al. 2023)."""
        import optuna

        sign = 1 if self._wanted.objectives[objective].minimize else -1
        with warnings.catch_warnings():
            # It warns that it is experimental and that it minimises the target, which is right here.
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
            importances = optuna.importance.get_param_importances(
                self._study, evaluator=evaluator, target=lambda trial: sign * trial.values[objective]
            )
        return {name: float(share) for name, share in importances.items()}

    def _is_cut_off(self, trial: Any) -> bool:
        if trial.state is not self._states.FAIL:
            return False
        return "error" not in trial.user_attrs or trial.number in self._retried

    @property
    def _retried(self) -> list[int]:
        """Numbers, by optuna's count, of failed trials that were queued again."""
        return list(self._study.user_attrs.get(_RETRIED, ()))


def number_of(trial: Any) -> int:
    """The number in the run's name, which stays the same when the trial is tried again."""
    return int(trial.user_attrs["run"].rpartition(".")[2])


def refuse_what_cannot_begin(wanted: Sweep) -> None:
    """Refuses what ``Study`` would, as far as it is known before models and data are downloaded. Raises ConfigError: as
    ``Study``."""
    _optuna()
    _refuse_long_names(wanted, _first_runs(wanted))


def _optuna() -> Any:
    try:
        import optuna
        import optuna.storages.journal
    except ImportError:
        raise ConfigError("sweeps need optuna", where="align sweep", remedy="pip install 'optuna>=4,<5'") from None
    return optuna


def _first_runs(wanted: Sweep) -> str:
    return f"{wanted.run_name}.{wanted.name}"


def _refuse_long_names(wanted: Sweep, runs: str) -> None:
    """Before the first trial, because only the later ones may have such a name."""
    longest = f"{runs}.{wanted.number - 1}"
    if not is_name(longest):
        message = f"a trial's run would be called {longest!r} ({len(longest)} characters); allowed: {NAME.allowed}"
        raise ConfigError(message, where="name", remedy="set a shorter name=…, or give the sweep's file a shorter name")


def _sampler(seed: int, trials: int) -> Any:
    """TPE with ``constant_liar``: running trials count as bad, so that parallel trials are drawn apart."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        at_random = min(_MOST_RANDOM, max(2, trials // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random, constant_liar=True)


def _distribution(parameter: ParameterConfig) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.values:
        return CategoricalDistribution(parameter.values)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.whole:
        return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
