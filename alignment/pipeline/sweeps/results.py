"""The results of a sweep so far: a table, ``sweep.json`` and a page, written again after each trial."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.core.terminal import say
from alignment.evaluation import paired_scores
from alignment.pipeline.execute.summary import REPORT, bounds_in_words, with_bounds
from alignment.pipeline.sweeps.objectives import Objective
from alignment.pipeline.sweeps.study import Study, number_of
from alignment.pipeline.sweeps.sweep_file import Sweep
from alignment.records import sweep_record
from alignment.records.evaluation import FEWEST_PROMPTS, LEVEL, Evaluation
from alignment.records.evaluation import FILE as EVALUATION_FILE
from alignment.records.interval import Interval
from alignment.report.doubts import is_smoke, of_evaluation
from alignment.report.sweep_page.sweep_report import build_sweep

PAGE = "sweep.html"


def words(settings: Mapping[str, sweep_record.Setting]) -> list[str]:
    """Settings as overrides."""
    return [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]


def write(study: Study, wanted: Sweep) -> sweep_record.SweepRecord:
    """Writes ``sweep.json`` and the page; returns their content."""
    record = _record(study, wanted)
    record.write(wanted.folder)
    build_sweep(record, wanted.folder / PAGE)
    return record


def show(console: Console, record: sweep_record.SweepRecord, wanted: Sweep) -> None:
    """Prints every trial, the best first, what to compare them with, and the best settings to paste."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("trial")
    for goal in record.goals:
        table.add_column(goal.label)
        table.add_column("95 %")
    table.add_column("settings")
    for trial in record.trials:
        cells = [cell for value in trial.figures for cell in (f"{value.mean:.3f}", bounds_in_words(value))]
        blank = [trial.state, *[""] * (2 * len(record.goals) - 1)]
        why = _unmet(trial.error) if trial.state == "done" else next(iter(trial.error.splitlines()), "")
        reason = f": {why}" if why else ""
        table.add_row(str(trial.number), *(cells or blank), escape(" ".join(trial.words) + reason))
    console.print()
    console.print(table)
    for goal in record.goals:
        if arms := [f"{label} {with_bounds(value)}" for label, value in goal.shared_arms.items()]:
            say(console, f"the same in all trials, to compare with {goal.label}: {', '.join(arms)}")
    say(console, *filter(None, [record.no_gain]))
    for trial in record.trials:
        if trial.number in record.best:
            say(console, f"{'tied' if record.is_tied else 'best'}: {shlex.join(trial.words)}")
    say(console, *filter(None, [record.verdict]), *(f"caution: {caution}" for caution in record.cautions))
    say(console, f"report: {wanted.folder / PAGE}")


def _unmet(error: str) -> str:
    lines = [line.strip() for line in error.splitlines()]
    return "; ".join(line for line in lines if not line.startswith("→"))


def _record(study: Study, wanted: Sweep) -> sweep_record.SweepRecord:
    best = study.best()
    trials = sorted((_trial(trial, wanted) for trial in study.ended()), key=lambda trial: _rank(trial, best, wanted))
    goals = [
        sweep_record.Goal(
            label=str(objective),
            minimize=objective.minimize,
            shared_arms=_shared_arms(study, objective, number),
            chance=objective.chance,
        )
        for number, objective in enumerate(wanted.objectives)
    ]
    smoke = is_smoke(wanted.profile)
    artifacts_of = {number_of(trial): trial.user_attrs.get("artifacts") for trial in study.completed()}
    by_prompt = {
        number: wanted.objectives[0].by_prompt(Path(artifacts[0])) if artifacts else {}
        for number, artifacts in artifacts_of.items()
    }
    return sweep_record.SweepRecord(
        name=wanted.folder.name,
        recipe=wanted.recipe,
        overrides=list(wanted.overrides),
        summary=wanted.config.summary,
        search=wanted.config.search.value,
        number=wanted.number,
        goals=goals,
        parameters=[
            sweep_record.Parameter(key=own.key, values=own.values, low=own.low, high=own.high, log=own.log)
            for own in wanted.config.parameters
        ],
        trials=trials,
        best=best,
        verdict=_verdict(trials, best, wanted, by_prompt),
        importance=_importance(study, wanted),
        cautions=[*wanted.cautions, *([] if smoke else _doubts(study, best))],
        no_gain="" if smoke else _no_gain(goals, trials),
    )


def _no_gain(goals: Sequence[sweep_record.Goal], trials: Sequence[sweep_record.Trial]) -> str:
    """The arm that the sweep does not train and no trial surpasses, if there is one. The best trial comes first."""
    if len(goals) > 1 or not trials or not trials[0].figures or not goals[0].shared_arms:
        return ""
    sign = -1 if goals[0].minimize else 1
    label, value = max(goals[0].shared_arms.items(), key=lambda arm: sign * arm[1].mean)
    if sign * trials[0].figures[0].mean > sign * value.mean:
        return ""
    return f"no trial does better than {label} ({value.mean:.3f}), which the sweep does not change"


def _shared_arms(study: Study, objective: Objective, number: int) -> dict[str, Interval]:
    """The metric of the arms that all trials share, by label; an arm is left out if trials measured different values.
    ``number`` is the objective's place among the sweep's."""
    if not objective.shared:
        return {}
    artifacts = [trial.user_attrs["artifacts"] for trial in study.completed() if trial.user_attrs.get("artifacts")]
    folders = [Path(of_trial[number]) for of_trial in artifacts]
    measured = [objective.of_shared(folder) for folder in folders if (folder / EVALUATION_FILE).is_file()]
    first = measured[0] if measured else {}
    return {label: value for label, value in first.items() if all(other.get(label) == value for other in measured)}


def _doubts(study: Study, best: Sequence[int]) -> list[str]:
    doubts: dict[str, None] = {}
    for trial in study.completed():
        if number_of(trial) in best and (unmet := trial.user_attrs.get("unmet")):
            doubts[f"trial {number_of(trial)} does not meet a gate: {_unmet(unmet)}"] = None
        for artifact in dict.fromkeys(trial.user_attrs.get("artifacts") or [] if number_of(trial) in best else []):
            if (Path(artifact) / EVALUATION_FILE).is_file():
                of_trial = of_evaluation(Evaluation.read(Path(artifact)))
                doubts |= dict.fromkeys(f"trial {number_of(trial)}: {doubt}" for doubt in of_trial)
    return list(doubts)


def _trial(ended: Any, wanted: Sweep) -> sweep_record.Trial:
    run = ended.user_attrs["run"]
    link = f"../../runs/{run}/{REPORT}"
    error = ended.user_attrs.get("error") or ended.user_attrs.get("unmet", "")
    if "pruned_at" in ended.user_attrs:
        pruning = wanted.config.pruning
        error = f"{pruning.metric} of {pruning.stage} was worse than the median at step {ended.user_attrs['pruned_at']}"
    bounds = ended.user_attrs.get("intervals", [])
    return sweep_record.Trial(
        number=number_of(ended),
        run=run,
        state={"COMPLETE": "done", "FAIL": "failed", "PRUNED": "pruned"}[ended.state.name],
        settings=dict(ended.params),
        words=words(ended.params),
        figures=[
            Interval(mean=mean, low=low, high=high)
            for mean, (low, high) in zip(ended.values or [], bounds, strict=False)
        ],
        error=error,
        report=link if (wanted.folder / link).is_file() else "",
    )


def _rank(trial: sweep_record.Trial, best: Sequence[int], wanted: Sweep) -> tuple[bool, bool, float, int]:
    sign = 1 if wanted.objectives[0].minimize else -1
    return (
        not trial.figures,
        trial.number not in best,
        sign * trial.figures[0].mean if trial.figures else 0.0,
        trial.number,
    )


def _verdict(
    trials: Sequence[sweep_record.Trial], best: Sequence[int], wanted: Sweep, by_prompt: Mapping[int, dict[str, float]]
) -> str:
    done = [trial for trial in trials if trial.figures]
    if len(wanted.objectives) > 1:
        are = f"{_trials(best)} {'is' if len(best) == 1 else 'are'}" if best else ""
        return f"{are} the Pareto set by their means: each of the others is beaten by one of these" if best else ""
    if len(done) < 2 or not (best_scores := by_prompt[done[0].number]):
        return ""
    tie = f"{_trials(best)} tie: their values are equal" if len(best) > 1 else ""
    others = {trial.number: by_prompt[trial.number] for trial in done if trial.number not in best}
    minimize = wanted.objectives[0].minimize
    verdict = _on_others(best_scores, others, minimize=minimize, num_trials=len(done))
    return "; ".join(filter(None, (tie, verdict)))


def _on_others(
    best_scores: dict[str, float], others: Mapping[int, dict[str, float]], *, minimize: bool, num_trials: int
) -> str:
    """Which of the ``others``, trials with their scores by prompt, may be as good as the best of ``num_trials``."""
    differences = {number: _differences(best_scores, scores) for number, scores in others.items()}
    known = {number: difference for number, difference in differences.items() if difference}
    unknown = [number for number in differences if number not in known]
    if not known:
        return ""
    # The best was chosen from the data, so that any pair of trials may be the best and another.
    pairs = num_trials * (num_trials - 1) // 2
    p_values = paired_scores.p_values_among(list(known.values()), comparisons=pairs)
    even = [
        number
        for (number, difference), p in zip(known.items(), p_values, strict=True)
        # On the shared prompts the best may even be worse, as it was ranked on all of its own.
        if p >= LEVEL or (sum(difference) < 0) != minimize
    ]
    if even:
        sentence = f"{_trials(even)} may be as good: the difference is within chance"
    else:
        compared = "every other trial" if not unknown else "each trial that can be compared"
        sentence = f"{compared} is worse, paired by prompt, by more than chance explains"
    if not unknown:
        return sentence
    return f"{sentence}; {_trials(unknown)} cannot be compared on {FEWEST_PROMPTS} prompts or more"


def _differences(best_scores: dict[str, float], other_scores: dict[str, float]) -> list[float]:
    best_on_both, other_on_both, _ = paired_scores.in_both(best_scores, other_scores)
    return (paired_scores.differences(best_on_both, other_on_both) or []) if len(best_on_both) >= FEWEST_PROMPTS else []


def _trials(numbers: Sequence[int]) -> str:
    return f"trial {numbers[0]}" if len(numbers) == 1 else f"trials {', '.join(map(str, numbers))}"


def _importance(study: Study, wanted: Sweep) -> list[dict[str, float]]:
    if len(wanted.config.parameters) < 2 or len(study.completed()) < sweep_record.FEWEST_FOR_IMPORTANCE:
        return []
    return [study.importance(index) for index in range(len(wanted.objectives))]
