"""Tables for the screen: a run's stages, and the arms of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.core.artifacts import EVALUATION, FORGETTING, REWARD_CARD
from alignment.core.errors import ArtifactError
from alignment.core.terminal import grid, print_whole, say
from alignment.core.wording import time_taken
from alignment.evaluation.conclusions import (
    coverage_conclusions,
    grade_conclusions,
    labelled_conclusions,
    metric_in_words,
    votes_in_words,
)
from alignment.pipeline.execute import gates, notes
from alignment.records.evaluation import FILE as EVALUATION_FILE
from alignment.records.evaluation import ArmResult, Comparison, Evaluation, JudgedPair
from alignment.records.interval import Interval
from alignment.records.reward_card import FILE as CARD_FILE
from alignment.records.reward_card import RewardCard
from alignment.records.run import RunRecord
from alignment.records.stages import Forgetting
from alignment.report import doubts
from alignment.report.run_page.run_records import artifact_folder
from alignment.stages.kind_problems import KindError
from alignment.stages.registry import OURS, lines_of, origin_of, produced_by, tables_of

REPORT = "report.html"
_NONE = "–"


def show_stages(console: Console, record: RunRecord, jobs: Mapping[str, str]) -> None:
    """A line for each stage: its state, duration and result's folder, and its Slurm job if it is unfinished."""
    table = grid()
    for name, stage in record.stages.items():
        job = jobs.get(name, "") if stage.state in ("waiting", "running", "failed") else ""
        folder = Path(stage.artifact).name
        words = time_taken(stage.seconds, stage.attempts)
        table.add_row(escape(name), stage.state, words, escape(folder), escape(job))
    console.print(table)


def show_results(console: Console, run_folder: Path, record: RunRecord) -> None:
    """Every finished evaluation, reward card and measurement of forgetting; the paths of the results if the run has no
    evaluation; and the path of the report."""
    made = _made(run_folder, record)
    for name, artifact in made.items():
        if produced_by(record.stages[name].kind) == EVALUATION and (artifact / EVALUATION_FILE).is_file():
            show_evaluation(console, Evaluation.read(artifact), reference=record.settings_of(name).get("reference"))
    for name, artifact in made.items():
        produced = produced_by(record.stages[name].kind)
        if produced == REWARD_CARD and (artifact / CARD_FILE).is_file():
            show_card(console, name, RewardCard.read(artifact))
        if produced == FORGETTING and (outcome := gates.read_outcome(artifact)) is not None:
            show_forgetting(console, name, outcome)
    if not any(produced_by(stage.kind) == EVALUATION for stage in record.stages.values()):
        for name, stage in record.stages.items():
            say(console, f"{name}: {artifact_folder(run_folder, name, stage) or ''}")
    for name, artifact in made.items():
        say(console, *_lines(record.stages[name].kind, artifact))
    if (run_folder / REPORT).is_file():
        say(console, f"report: {run_folder / REPORT}")


def show_doubts(console: Console, run_folder: Path, record: RunRecord) -> None:
    """Doubts about the results of a run, for whoever has not seen them as its stages ended."""
    made = {} if doubts.is_smoke(record.profile) else _made(run_folder, record)
    lines = [f"this is {doubts.SMOKE}"] if doubts.is_smoke(record.profile) else []
    lines += [f"{name}: {doubt}" for name in made for doubt in notes.of_result(record.stages[name].kind, made[name])]
    say(console, *(f"note: {line}" for line in lines))


def _made(run_folder: Path, record: RunRecord) -> dict[str, Path]:
    folders = {name: artifact_folder(run_folder, name, stage) for name, stage in record.stages.items()}
    return {name: folder for name, folder in folders.items() if folder is not None and record.stages[name].complete}


def _lines(kind: str, artifact: Path) -> list[str]:
    """What the stage's kind prints of its result. If a function of a kind from another package fails, the error is
    printed in its place. So is that of its tables, which the report lacks."""
    try:
        lines = lines_of(kind, artifact)
    except KindError as error:
        lines = [error.labelled]
    if origin_of(kind) != OURS:
        try:
            tables_of(kind, artifact)
        except (KindError, ArtifactError) as error:
            lines.append(error.labelled)
        except FileNotFoundError as error:
            lines.append(f"the tables of {kind} are missing: {error}")
    return lines


_COLUMNS: dict[str, Callable[[ArmResult], str]] = {
    "words": lambda arm: _mean(arm.words, digits=1),
    "reward": lambda arm: _mean(arm.reward),
    "log-ratio": lambda arm: _mean(arm.greedy_log_ratio),
    "KL": lambda arm: _mean(arm.kl),
    "loss": lambda arm: _mean(arm.loss),
}
"""The figures that every arm may have; one that no arm has is left out."""
_UNITS = {
    "log-ratio": "log-ratio of greedy answers to the reference{name}, in nats per sequence",
    "KL": "KL from the reference{name} on sampled answers, in nats per sequence",
}


def show_evaluation(console: Console, evaluation: Evaluation, *, reference: Any = None) -> None:
    """The arms side by side, then a line for each comparison that says whether the difference is real. ``reference`` is
    the arm of the log-ratios, as a run's settings name it."""
    others = [metric.name for metric in evaluation.metrics if metric.name != evaluation.primary]
    primary = [] if evaluation.primary is None else [escape(evaluation.primary), "95 %"]
    columns = {title: cell for title, cell in _COLUMNS.items() if any(cell(arm) != _NONE for arm in evaluation.arms)}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("arm", *primary, *map(escape, others), *columns):
        table.add_column(title, justify="left" if title == "arm" else "right", no_wrap=True)
    for arm in evaluation.arms:
        of_primary = evaluation.primary_of(arm)
        table.add_row(
            escape(arm.label),
            *((_mean(of_primary, digits=3), bounds_in_words(of_primary)) if primary else ()),
            *(_mean(arm.metrics.get(name)) for name in others),
            *(cell(arm) for cell in columns.values()),
        )
    console.print()
    print_whole(console, table)
    lines = [_in_words(comparison, evaluation) for comparison in evaluation.comparisons]
    if evaluation.judge is not None:
        lines += [_judged_in_words(pair, evaluation, by=evaluation.judge.name) for pair in evaluation.judge.pairs]
        lines += labelled_conclusions(evaluation.judge)
    labels = {arm.name: arm.label for arm in evaluation.arms}
    lines += grade_conclusions(evaluation.gradings, evaluation.num_prompts or 0, labels)
    lines += coverage_conclusions(evaluation.num_scored, evaluation.num_prompts or 0)
    name = f" ({evaluation.label(reference)})" if isinstance(reference, str) else ""
    units = [_UNITS[title].format(name=name) for title in columns if title in _UNITS]
    compared, metric = "no metric, so no arm is called better", evaluation.primary_metric
    if metric is not None:
        compared = f"{metric.name}: {'more' if metric.higher_is_better else 'less'} is better"
    say(console, *lines, "; ".join([f"{evaluation.num_prompts} held-out prompts", compared, *units]))


def show_card(console: Console, name: str, card: RewardCard) -> None:
    """How often a reward model is right, compared with simpler judges, and the card's warnings."""
    judges = []
    for judge in card.baselines:
        words, difference = f"{judge.name} {with_bounds(judge.accuracy)}", judge.difference
        if difference is not None:
            within = f" ({difference.low:+.3f} to {difference.high:+.3f})" if difference.bounds else ""
            words += f", difference {difference.mean:+.3f}{within}"
        judges.append(words)
    say(console, f"{name}: right on {with_bounds(card.accuracy)} of {card.num_pairs} pairs; {'; '.join(judges)}")
    say(console, *(f"  {sentence}" for sentence in card.warnings))


def show_forgetting(console: Console, name: str, record: Forgetting) -> None:
    """A line for each arm: before and after, and whether it passed; without limits no arm is judged."""
    for arm in record.arms[1:]:
        verdict = "passed" if arm.passed else "forgot too much"
        perplexity = _before_and_after(record.arms[0].perplexity, arm.perplexity, digits=2)
        ability = _before_and_after(record.arms[0].ability, arm.ability, digits=3)
        say(
            console,
            f"{name}: {arm.label} {verdict if record.judged else 'not judged'}: perplexity of general text "
            f"{perplexity} ({_signed(arm.rise, '+.1%')}), questions {ability} ({_signed(arm.drop, '+.3f', sign=-1)})",
        )


def _before_and_after(before: float | None, after: float | None, *, digits: int) -> str:
    return " → ".join("–" if value is None else f"{value:.{digits}f}" for value in (before, after))


def _signed(change: Interval | None, form: str, *, sign: int = 1) -> str:
    return "–" if change is None else f"{sign * change.mean:{form}}"


def verdicts(kind: str, artifact: Path) -> list[str]:
    """A line for each comparison of an evaluation's arms; nothing for other kinds of result."""
    if produced_by(kind) != EVALUATION:
        return []
    evaluation = Evaluation.read(artifact)
    return [_in_words(comparison, evaluation) for comparison in evaluation.comparisons]


def _in_words(comparison: Comparison, evaluation: Evaluation) -> str:
    arm, against = evaluation.label(comparison.arm), evaluation.label(comparison.against)
    interval = f"{comparison.difference:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"
    return f"{arm} against {against}: {interval}{comparison.p_in_words}, {evaluation.verdict(comparison)}"


def _judged_in_words(pair: JudgedPair, evaluation: Evaluation, *, by: str) -> str:
    arm, against = evaluation.label(pair.arm), evaluation.label(pair.against)
    if pair.win_rate is None:
        return f"by {by}, {arm} against {against}: {pair.verdict} ({pair.why_nothing})"
    low, high = pair.win_rate.bounds or (pair.win_rate.mean, pair.win_rate.mean)
    interval = f"{pair.win_rate.mean:.2f} ({low:.2f} to {high:.2f})"
    agreement = "" if evaluation.primary is None else metric_in_words(pair, evaluation.primary)
    return f"by {by}, {arm} wins {interval} against {against}: {pair.verdict}{votes_in_words(pair)}{agreement}"


def _mean(figure: Interval | None, digits: int = 2) -> str:
    return _NONE if figure is None else f"{figure.mean:.{digits}f}"


def bounds_in_words(figure: Interval | None) -> str:
    """``0.610–0.690``; empty without bounds."""
    return "" if figure is None or figure.bounds is None else f"{figure.bounds[0]:.3f}–{figure.bounds[1]:.3f}"


def with_bounds(figure: Interval) -> str:
    """``0.650 (0.610–0.690)``, or the mean alone."""
    return f"{figure.mean:.3f}" + (f" ({bounds_in_words(figure)})" if figure.bounds else "")
