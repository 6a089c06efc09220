"""Optuna's study of a sweep: which settings come next, and what came of each; a journal of lines beside the trials."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignment.config.sweep import ParameterConfig, Pruner, PruningConfig, Search
from alignment.core.errors import ConfigError
from alignment.pipeline.sweeps.sweep_file import Sweep
from alignment.records.interval import Interval

JOURNAL = "study.jsonl"
_MOST_RANDOM = 10
"""Trials before TPE learns from them, as optuna has it; fewer where there are few in all."""


class Study:
    """The study of just these questions in the sweep's folder, a new one if there is none.

    A trial is optuna's; ``user_attrs`` hold its ``run``, and once it is told its ``error``, the step it was
    ``pruned_at``, or its ``intervals`` and the ``artifacts`` that its figures stand in. One that was cut off is told as
    failed without an ``error``, counts for nothing and is tried again under the same run name, so that its stages go on
    from their checkpoints.
    """

    def __init__(self, wanted: Sweep) -> None:
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise ConfigError("sweeps need optuna", where="align sweep", remedy="pip install 'optuna>=4,<5'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        wanted.folder.mkdir(parents=True, exist_ok=True)
        self._wanted = wanted
        self._states = optuna.trial.TrialState
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(wanted.folder / JOURNAL)))
        self._study = optuna.create_study(
            study_name=f"{wanted.name}-{wanted.identity[:16]}",
            storage=storage,
            directions=["minimize" if one.minimize else "maximize" for one in wanted.objectives],
            pruner=_pruner(wanted.config.pruning),
            load_if_exists=True,
        )
        is_first = optuna.get_all_study_names(storage)[0] == self._study.study_name
        # Runs of later studies have names of their own, so that no study takes another's for its own.
        self._runs = f"{wanted.run_name}.{wanted.name}" + ("" if is_first else f".{wanted.identity[:8]}")

    def retry_cut_off(self) -> None:
        """Has tried again what a process was at that is gone; call it while no trial runs."""
        for trial in self._study.get_trials(states=[self._states.RUNNING]):
            self.again(trial)

    def next(self) -> Any | None:
        """The next trial, or None when all were made or are under way."""
        config = self._wanted.config
        counted = [one for one in self._study.trials if not self._is_cut_off(one)]
        if not any(one.state is self._states.WAITING for one in counted):
            if config.search is Search.tpe and len(counted) >= (config.trials or 0):
                return None
            if config.search is Search.grid:
                tried = [one.params for one in counted]
                combination = next((one for one in _grid(config.parameters) if one not in tried), None)
                if combination is None:
                    return None
                self._study.enqueue_trial(combination)
        number = sum("run" in one.user_attrs for one in counted)
        # A sampler of its own for each trial: what it draws does not depend on stops in between.
        self._study.sampler = _sampler(config.seed + number, config.trials or 0)
        trial = self._study.ask({one.key: _distribution(one) for one in config.parameters})
        if "run" not in trial.user_attrs:
            trial.set_user_attr("run", f"{self._runs}.{number}")
        return trial

    def again(self, trial: Any) -> None:
        """The trial was stopped, and is tried again."""
        self._study.tell(trial.number, state=self._states.FAIL)
        if "run" in trial.user_attrs:  # else it was cut off before it had a name, and asks nothing yet
            self._study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs["run"]})

    def complete(self, trial: Any, figures: Sequence[Interval], artifacts: Sequence[Path]) -> None:
        """The trial came to its end; a figure and the artifact that it stands in for each objective."""
        trial.set_user_attr("artifacts", [str(one) for one in artifacts])
        trial.set_user_attr("intervals", [[one.low, one.high] for one in figures])
        self._study.tell(trial, [one.mean for one in figures])

    def fail(self, trial: Any, error: str) -> None:
        """The trial failed; it is not tried again."""
        trial.set_user_attr("error", error)
        self._study.tell(trial, state=self._states.FAIL)

    def prune(self, trial: Any, step: int) -> None:
        """The trial was stopped for good at a step."""
        trial.set_user_attr("pruned_at", step)
        self._study.tell(trial, state=self._states.PRUNED)

    def told(self) -> list[Any]:
        """All trials that are done, failed or pruned, in order."""
        return [one for one in self._study.trials if one.state.is_finished() and not self._is_cut_off(one)]

    def completed(self) -> list[Any]:
        """The trials that have figures."""
        return [one for one in self.told() if one.state is self._states.COMPLETE]

    def best(self) -> list[int]:
        """Number of the best trial, the first of equals, or those of the Pareto set; none before a trial is done."""
        if not self.completed():
            return []
        several = len(self._wanted.objectives) > 1
        return [number_of(one) for one in (self._study.best_trials if several else [self._study.best_trial])]

    def importance(self, place: int) -> dict[str, float]:
        """The share of each parameter in whether an objective comes out in its better half (Watanabe et al. 2023)."""
        import optuna

        sign = 1 if self._wanted.objectives[place].minimize else -1
        with warnings.catch_warnings():
            # That it is experimental, and that a target is to be small, as it is here.
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.5)
            found = optuna.importance.get_param_importances(
                self._study, evaluator=evaluator, target=lambda trial: sign * trial.values[place]
            )
        return {name: float(share) for name, share in found.items()}

    def _is_cut_off(self, trial: Any) -> bool:
        return trial.state is self._states.FAIL and "error" not in trial.user_attrs


def number_of(trial: Any) -> int:
    """The number in its run's name, which stays when it is tried again."""
    return int(trial.user_attrs["run"].rpartition(".")[2])


def _pruner(config: PruningConfig) -> Any:
    import optuna

    if config.pruner is Pruner.none:
        return optuna.pruners.NopPruner()
    from alignment.pipeline.sweeps.median import LatestMedian

    return LatestMedian(startup_trials=config.startup_trials, warmup_steps=config.warmup_steps)


def _sampler(seed: int, trials: int) -> Any:
    """``constant_liar``: trials at once are drawn apart, those under way being taken for bad ones."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=min(_MOST_RANDOM, max(2, trials // 3)), constant_liar=True
        )


def _grid(parameters: Sequence[ParameterConfig]) -> Iterator[dict[str, str]]:
    keys = [one.key for one in parameters]
    return (dict(zip(keys, values, strict=True)) for values in itertools.product(*(one.values for one in parameters)))


def _distribution(one: ParameterConfig) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.values:
        return CategoricalDistribution(one.values)
    assert one.low is not None
    assert one.high is not None
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    return FloatDistribution(one.low, one.high, log=one.log)
