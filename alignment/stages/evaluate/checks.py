"""What is wrong with the settings of graders, judges, votes and labelled pairs."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment.config.evaluating import EndpointConfig, GraderConfig, JudgeConfig, JudgeKind, LabelledConfig
from alignment.config.faults import Fault, suggestion, unread_faults, unread_notes
from alignment.config.scoring import MetricConfig, pass_size
from alignment.core.errors import DataError
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.answer_pairs import PACKAGE
from alignment.evaluation.endpoint_client import client_missing, endpoint_faults, scale_faults
from alignment.evaluation.paired_scores import primary_name
from alignment.evaluation.verdicts import pairs_of
from alignment.records.votes import FILE, read_votes
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.scorer_sources import CHOICE, GRADE
from alignment.stages.evaluate.config import EvaluateConfig


def is_graded(config: EvaluateConfig) -> bool:
    """Whether a metric asks the grader."""
    return any(metric.source == GRADE for metric in config.metrics)


def grader_faults(stage: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    """All faults in the grader's settings and in the metrics that use it; ``where`` is the stage's key.

    A stage that makes no progress for ``hang_seconds`` is stopped; 0 turns this off.
    """
    for number, metric in enumerate(stage.metrics):
        if metric.rubric is not None and metric.source != GRADE:
            message = f"has no effect; only the source '{GRADE}' uses it, but source is '{metric.source}'"
            yield Fault(where=f"{where}.metrics[{number}].rubric", message=message)
        elif metric.source == GRADE and (message := client_missing(GRADE)):
            yield Fault(where=f"{where}.metrics[{number}].source", message=message)
    grader, path = stage.grader, f"{where}.grader"
    if is_graded(stage):
        yield from endpoint_faults(grader.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        yield from scale_faults(grader, path)
        yield from _passing_faults(grader, stage.metrics, where)
    elif grader != GraderConfig():
        message = f"unused, because no metric has the source '{GRADE}'; add one, or remove the grader"
        yield Fault(where=path, message=message)


def _passing_faults(grader: GraderConfig, metrics: list[MetricConfig], where: str) -> Iterator[Fault]:
    """A passing score that every grade reaches, or none does, makes pass@K say nothing."""
    for number, metric in enumerate(metrics):
        splits = grader.lowest < metric.passing_score <= grader.highest
        if metric.source == GRADE and pass_size(metric.aggregate) is not None and not splits:
            grades = f"grades go from {grader.lowest} to {grader.highest}; choose one of them above {grader.lowest}"
            message = f"{metric.passing_score:g} lets all grades pass or none, because {grades}"
            yield Fault(where=f"{where}.metrics[{number}].passing_score", message=message)


FIELD = "judge.votes"


def votes_files(config: EvaluateConfig, folder: Path) -> Mapping[str, Path]:
    """The file of votes, if people judge: the configured one, or that of ``align judge`` in ``folder`` if there is one.

    Raises:
        DataError: the configured file does not exist, or the file is damaged.
    """
    if config.judge.kind is not JudgeKind.people:
        return {}
    path = folder / FILE if config.judge.votes is None else Path(config.judge.votes).expanduser().absolute()
    if not path.is_file():
        if config.judge.votes is None:
            return {}
        raise DataError(
            f"no file {path}",
            where=f"stages.{folder.name}.{FIELD}",
            remedy="name a file of `align judge`, or leave it out to use the votes on this run",
        )
    read_votes(path)
    return {FIELD: path}


def vote_notes(config: EvaluateConfig, folder: Path) -> Iterator[str]:
    """A note if people judge and nobody has voted yet, with the command that collects votes."""
    if config.judge.kind is not JudgeKind.people or any(map(read_votes, votes_files(config, folder).values())):
        return
    yield (
        "nobody has voted yet, so there is no win rate; after the run, collect votes with "
        f"`{_command(config, folder)}`, and run the recipe again to count them"
    )


def _command(config: EvaluateConfig, folder: Path) -> str:
    """``align judge`` for the stage whose folder of the run is ``OUTPUT/runs/RUN/STAGE``."""
    run, output = folder.parent, folder.parents[2]
    words = ["align", "judge", run.name, "--stage", folder.name]
    if pairs := config.judge.pairs:
        words += ["--arm", pairs[0].arm, "--arm", pairs[0].against]
    elif len(config.arms) != 2:
        words += ["--arm", "ARM", "--arm", "ARM"]
    if config.judge.votes is not None:
        words += ["--votes", config.judge.votes]
    return shlex.join([*words, *([] if output == Path.cwd() else ["--output", str(output)])])


def single_answer_checks(config: EvaluateConfig) -> tuple[Callable[[HeldOutPrompt], object], ...]:
    """Raises DataError for a row of several turns if people judge: a vote is on one answer to one prompt."""
    return (_one_turn,) if config.judge.kind is JudgeKind.people else ()


def _one_turn(row: HeldOutPrompt) -> None:
    if row.later_turns:
        raise DataError(
            f"'turns' asks {row.num_turns} turns, but people judge single answers",
            where=row.where,
            remedy="choose another judge.kind, or leave out rows of several turns",
        )


def people_faults(judge: JudgeConfig, path: str) -> Iterator[Fault]:
    """Settings of a judge that has votes, or that could not count them; ``path`` is the judge's key."""
    if judge.kind is not JudgeKind.people:
        yield from unread_faults(judge, JudgeConfig(), ("votes",), path, "only judge.kind 'people'")
        return
    yield from unread_notes(judge, JudgeConfig(), ("max_prompts", "max_invalid"), path, "only another kind of judge")
    if importlib.util.find_spec("krippendorff") is None:
        message = f"'people' needs the package krippendorff, which is not installed; pip install '{PACKAGE}'"
        yield Fault(where=f"{path}.kind", message=message)


def judge_faults(stage: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    """All faults in the settings of an evaluation's judge; ``where`` is the stage's key.

    A stage that makes no progress for ``hang_seconds`` is stopped; 0 turns this off.
    """
    judge = stage.judge
    path = f"{where}.judge"
    if judge.kind is JudgeKind.none:
        if judge.pairs:
            yield Fault(where=f"{path}.pairs", message="unused, because judge.kind is 'none'; set judge.kind")
    else:
        yield from _pair_faults(stage, path)
    yield from people_faults(judge, path)
    if judge.kind is JudgeKind.metric and not stage.metrics:
        message = f"'metric' judges by the primary metric, and {where}.metrics is empty; name one"
        yield Fault(where=f"{path}.kind", message=message)
    if judge.kind is JudgeKind.reward and stage.reward is None:
        yield Fault(where=f"{path}.kind", message=f"'reward' judges by {where}.reward, which is null; name a model")
    if judge.kind is JudgeKind.endpoint:
        yield from endpoint_faults(judge.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        if message := client_missing("endpoint"):
            yield Fault(where=f"{path}.kind", message=message)
    elif judge.endpoint != EndpointConfig():
        message = f"unused; only judge.kind 'endpoint' uses it, and judge.kind is '{judge.kind.value}'"
        yield Fault(where=f"{path}.endpoint", message=message)


def _pair_faults(stage: EvaluateConfig, path: str) -> Iterator[Fault]:
    for number, pair in enumerate(stage.judge.pairs):
        for name, arm in (("arm", pair.arm), ("against", pair.against)):
            if arm not in stage.arms:
                message = f"{arm!r} is not an arm of this evaluation; {suggestion(arm, stage.arms)}"
                yield Fault(where=f"{path}.pairs[{number}].{name}", message=message)
        if pair.arm == pair.against:
            yield Fault(where=f"{path}.pairs[{number}]", message=f"{pair.arm!r} is compared with itself; name two arms")
    if not pairs_of(stage.judge, stage.arms, reference=stage.reference):
        message = "no trained arm can be compared with the reference or base+prompt; name pairs: [{arm: …, against: …}]"
        yield Fault(where=f"{path}.pairs", message=message)


JUDGES = (JudgeKind.metric, JudgeKind.reward, JudgeKind.endpoint)
"""The judges that can be given any two answers."""
DATA = "judge.labelled.data"


def labels_pairs(judge: JudgeConfig) -> bool:
    """Whether the judge is held against people's labels."""
    return bool(judge.labelled.data.source) and judge.kind in JUDGES


def primary_metric(config: EvaluateConfig) -> MetricConfig | None:
    """The settings of the metric that arms are compared by."""
    name = primary_name(config.metrics, config.primary)
    return next((metric for metric in config.metrics if metric.name == name), None)


def labelled_faults(stage: EvaluateConfig, where: str) -> Iterator[Fault]:
    """All faults in the settings of labelled pairs; ``where`` is the stage's key."""
    judge, path = stage.judge, f"{where}.judge.labelled"
    if judge.labelled == LabelledConfig():
        return
    if judge.kind not in JUDGES:
        kinds = ", ".join(kind.value for kind in JUDGES)
        message = f"unused: a judge of the kind {judge.kind.value!r} cannot judge pairs from a file; only {kinds} can"
        yield Fault(where=path, message=message)
    elif not judge.labelled.data.source:
        message = "missing, so the other settings are unused; name preference pairs that people have labelled"
        yield Fault(where=f"{path}.data.source", message=message)
    metric = primary_metric(stage)
    if judge.kind is JudgeKind.metric and metric is not None and metric.source == CHOICE:
        message = f"the primary metric's source {CHOICE!r} does not score answers; choose another judge.kind"
        yield Fault(where=path, message=message)


def labelled_checks(config: EvaluateConfig) -> tuple[Callable[[Any], object], ...]:
    """Checks for what the primary metric reads in a labelled row, if it is the judge."""
    metric = primary_metric(config)
    if config.judge.kind is not JudgeKind.metric or metric is None:
        return ()

    def check(record: Any) -> None:
        rule = rule_of(metric)
        if rule is not None:
            rule.expected(record)

    return (check,)
