"""A recipe many times over with other settings: each trial is a run of its own, judged by its evaluation.

Stages that a setting does not reach are made once, because results are found again by their fingerprints. The study is
a journal of lines beside the trials; a sweep that was stopped goes on with what is missing (docs/design/0012).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.config.sweep import Metric, ParameterConfig, Search
from alignment.errors import PREEMPTED, AlignmentError, Busy, ConfigError
from alignment.locks import held
from alignment.pipeline import paired
from alignment.pipeline.record import read_record
from alignment.pipeline.run import run
from alignment.pipeline.signals import INTERRUPTED
from alignment.pipeline.sweep_file import Sweep, read_sweep

JOURNAL = "study.jsonl"


def sweep(recipe: str, name: str, overrides: Sequence[str], *, console: Console) -> int:
    """Runs the trials that are missing; returns the exit code: 0 if any trial ever came to its end.

    Raises:
        ConfigError: the sweep does not fit the recipe, or optuna is not installed.
        Busy: another process works on it.
    """
    wanted = read_sweep(recipe, name, overrides)
    study = _study(wanted)
    with held(wanted.folder / "lock", wait=False):
        _retry_cut_off(study)
        console.print(f"{wanted.name}: {wanted.number} trials of {wanted.run_name}", highlight=False)
        while (trial := _next(study, wanted)) is not None:
            number = trial.user_attrs["run"].rpartition(".")[2]
            console.print(f"[bold]trial {number}[/]  {escape(' '.join(_told(trial.params)))}", highlight=False)
            code = _try(study, trial, wanted, console)
            if code in (INTERRUPTED, PREEMPTED):
                console.print("stopped; the same command goes on from here", highlight=False)
                return code
    show(console, study, wanted)
    return 0 if any(trial.value is not None for trial in study.trials) else 5


# ---- the study ------------------------------------------------------------------------------------------------------


def _study(wanted: Sweep) -> Any:
    """The study of just these questions in the sweep's folder, a new one if there is none."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise ConfigError("sweeps need optuna", where="align sweep", remedy="pip install 'optuna>=4,<5'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name=f"{wanted.name}-{wanted.identity[:16]}",
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(wanted.folder / JOURNAL))),
        direction="minimize" if wanted.config.objective.minimize else "maximize",
        sampler=optuna.samplers.TPESampler(seed=wanted.config.seed),
        load_if_exists=True,
    )


def _retry_cut_off(study: Any) -> None:
    """What a process was at that is gone, since the lock is ours, is tried again; its stages go on from checkpoints."""
    import optuna

    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        _again(study, trial)


def _again(study: Any, trial: Any) -> None:
    import optuna

    study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
    if "run" in trial.user_attrs:  # else it was cut off before it had a name, and asks nothing yet
        study.enqueue_trial(trial.params, user_attrs={"run": trial.user_attrs["run"]})


def _next(study: Any, wanted: Sweep) -> Any | None:
    """The next trial, or None when all were made."""
    import optuna

    done = [one for one in study.trials if one.state is not optuna.trial.TrialState.PRUNED]
    waiting = [one for one in done if one.state is optuna.trial.TrialState.WAITING]
    if not waiting:
        if wanted.config.search is Search.tpe and len(done) >= (wanted.config.trials or 0):
            return None
        if wanted.config.search is Search.grid:
            tried = [one.params for one in done]
            combination = next((one for one in _grid(wanted.config.parameters) if one not in tried), None)
            if combination is None:
                return None
            study.enqueue_trial(combination)
    trial = study.ask({one.key: _distribution(one) for one in wanted.config.parameters})
    if "run" not in trial.user_attrs:
        trial.set_user_attr("run", f"{wanted.run_name}.{wanted.name}.{trial.number}")
    return trial


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


def _told(params: dict[str, Any]) -> list[str]:
    return [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


# ---- a trial --------------------------------------------------------------------------------------------------------


def _try(study: Any, trial: Any, wanted: Sweep, console: Console) -> int:
    """Runs a trial and tells the study of it; a fault is written down and ends no sweep."""
    import optuna

    name = trial.user_attrs["run"]
    group = f"tracking.group={wanted.run_name}.{wanted.name}"
    told = [group, *wanted.overrides, *_told(trial.params), f"name={name}"]
    try:
        code = run(wanted.recipe, told, console=console)
        if code:  # stopped: what it has made is found again
            _again(study, trial)
            return code
        figure = _objective(wanted, name)
    except Busy:
        raise
    except AlignmentError as error:
        trial.set_user_attr("error", str(error).splitlines()[0])
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        console.print(f"trial {trial.number} failed: {error}", markup=False, highlight=False, soft_wrap=True)
        return error.exit_code
    trial.set_user_attr("interval", [figure["low"], figure["high"]])
    study.tell(trial, figure["mean"])
    return 0


def _objective(wanted: Sweep, run_name: str) -> dict[str, float]:
    """Mean and interval of the objective.

    Raises:
        ConfigError: the evaluation has no such figure.
    """
    output = wanted.folder.parents[1]
    artifact = Path(read_record(output / "runs" / run_name)["stages"][wanted.evaluation]["artifact"])
    arms = json.loads((artifact / "evaluation.json").read_text(encoding="utf-8"))["arms"]
    told: dict[str, Any] = next(one for one in arms if one["name"] == wanted.config.objective.arm)
    figure: dict[str, float] | None = told[wanted.config.objective.metric.value]
    if figure is None:
        raise ConfigError(
            f"the evaluation tells no {wanted.config.objective.metric.value} of {wanted.config.objective.arm}",
            where="objective",
            remedy="take another metric, or give the evaluation a reward model (stages.evaluate.reward)",
        )
    return figure


# ---- what came of it ------------------------------------------------------------------------------------------------


def show(console: Console, study: Any, wanted: Sweep) -> None:
    """Every trial, the best one first, and the best as words to paste; also as ``sweep.json``."""
    told = [_row(one) for one in study.trials if one.state.name in ("COMPLETE", "FAIL")]
    sign = 1 if wanted.config.objective.minimize else -1
    rows = sorted(told, key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0)))
    (wanted.folder / "sweep.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    objective = wanted.config.objective
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("trial", f"{objective.metric.value} of {objective.arm}", "95 %", "settings"):
        table.add_column(title)
    for row in rows:
        interval = "–".join(f"{bound:.3f}" for bound in row["interval"])
        value = "failed" if row["value"] is None else f"{row['value']:.3f}"
        table.add_row(str(row["trial"]), value, interval, escape(row["error"] or " ".join(row["settings"])))
    console.print()
    console.print(table)
    if rows and rows[0]["value"] is not None:
        console.print(f"best: {' '.join(rows[0]['settings'])}", markup=False, highlight=False, soft_wrap=True)
        if objective.metric is Metric.gold and (told_even := _as_good(rows, wanted)):
            console.print(told_even, markup=False, highlight=False, soft_wrap=True)


def _row(trial: Any) -> dict[str, Any]:
    return {
        "trial": int(trial.user_attrs["run"].rpartition(".")[2]),  # one that was tried again keeps its number
        "run": trial.user_attrs["run"],
        "settings": _told(trial.params),
        "value": trial.value,
        "interval": trial.user_attrs.get("interval", []),
        "error": trial.user_attrs.get("error", ""),
    }


def _as_good(rows: Sequence[dict[str, Any]], wanted: Sweep) -> str:
    """Which others these prompts do not tell from the best, by differences prompt by prompt."""
    best = _golds(rows[0], wanted)
    even = []
    for row in rows[1:]:
        found = paired.difference(best, _golds(row, wanted)) if row["value"] is not None else None
        if found is not None and not found.excludes_zero():
            even.append(str(row["trial"]))
    return f"trials {', '.join(even)} may be as good: their differences are within chance" if even else ""


def _golds(row: dict[str, Any], wanted: Sweep) -> dict[str, float]:
    artifact = paired.evaluations(wanted.folder.parents[1] / "runs" / row["run"])[wanted.evaluation]
    return paired.gold(artifact, wanted.config.objective.arm)
