"""The stage kind ``evaluate``, as the rest of the package sees it: its settings, and what is wrong with them."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from alignment.config.data import DataConfig
from alignment.config.evaluating import (
    FEW_SHOT,
    PROMPTED,
    AnswersConfig,
    EndpointConfig,
    FewShotConfig,
    GateConfig,
    GraderConfig,
    JudgeConfig,
    JudgeKind,
    LabelledConfig,
)
from alignment.config.faults import Fault, suggestion, unread_faults, unread_notes
from alignment.config.launch import SamplingConfig
from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Reasoned
from alignment.config.rules import FILLED, POSITIVE
from alignment.config.run import RunConfig
from alignment.config.scoring import MetricConfig, pass_size
from alignment.config.stage import reference_to
from alignment.core.artifacts import EVALUATION, POLICY, REWARD_MODEL
from alignment.core.errors import DataError
from alignment.core.fingerprint import IF_SET
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair
from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.evaluation import paired_scores
from alignment.evaluation.answer_pairs import PACKAGE
from alignment.evaluation.endpoint_client import api_key, client_missing, endpoint_faults, scale_faults
from alignment.evaluation.verdicts import pairs_of
from alignment.records.votes import FILE, read_votes
from alignment.rewards.rules.all_rules import rule_of
from alignment.rewards.scorer_sources import CHOICE, GRADE, REWARD, source_field
from alignment.stages import base
from alignment.stages.shared.kind_answers import check_engine, of_arms, reward_model_slots, sampling_faults
from alignment.stages.shared.new_settings import data_of, maximises_scores, new_tokens, rows_with_answers


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Scores greedy answers of every arm to held-out prompts: metrics, reward model and log-ratio to ``reference``.

    ``arms`` are ``base``, ``base+prompt`` (with ``system_prompt`` as a system message), ``base+few-shot`` (examples
    before the prompt), ``stage:NAME``, and external models (``path:FOLDER``, ``hub:ORG/NAME@REVISION``), which may have
    their own tokenizer and chat template. Without a reward model (``reward: null``) that column stays empty. Arms are
    compared by the metric that ``primary`` names, by default the first; without metrics, no arm is called better than
    another. ``sampling`` says what generates the answers."""

    kind: str = "evaluate"
    arms: Annotated[list[str], FILLED] = field(
        default_factory=lambda: ["base", "stage:sft", "stage:dpo", "stage:ppo"],
        metadata={"reference": ("policy",), "identity": False},
    )
    reference: str = reference_to("stage:sft", "policy")
    reward: str | None = reference_to("stage:reward", "reward")
    data: DataConfig = field(default_factory=DataConfig)
    metrics: list[MetricConfig] = field(default_factory=list)
    grader: GraderConfig = field(default_factory=GraderConfig)
    primary: str | None = None
    system_prompt: str | None = None
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    batch_size: Annotated[int, POSITIVE] = field(default=128, metadata={"identity": False})
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    gate: list[GateConfig] = field(default_factory=list, metadata={"identity": False})
    sampling: SamplingConfig = field(default_factory=SamplingConfig, metadata=IF_SET)


VOTES, LABELLED = "judge.votes", "judge.labelled.data"
"""Fields of the settings."""
_JUDGES = (JudgeKind.metric, JudgeKind.reward, JudgeKind.endpoint)
"""The judges that can be given any two answers."""


def is_graded(config: EvaluateConfig) -> bool:
    return any(metric.source == GRADE for metric in config.metrics)


def labels_pairs(judge: JudgeConfig) -> bool:
    return bool(judge.labelled.data.source) and judge.kind in _JUDGES


def primary_metric(config: EvaluateConfig) -> MetricConfig | None:
    name = paired_scores.primary_name(config.metrics, config.primary)
    return next((metric for metric in config.metrics if metric.name == name), None)


# ---- rows and files --------------------------------------------------------------------------------------------------


def _data(config: EvaluateConfig) -> list[base.DataSlot]:
    by_people = config.judge.kind is JudgeKind.people
    return [
        base.DataSlot(
            field="data", data=config.data, record=HeldOutPrompt, checks=(_refuse_turns,) if by_people else ()
        ),
        base.DataSlot(
            field="few_shot.data",
            data=config.few_shot.data,
            record=Conversation,
            rows=CONVERSATIONS,
            in_use=FEW_SHOT in config.arms,
        ),
        base.DataSlot(
            field=LABELLED,
            data=config.judge.labelled.data,
            record=PreferencePair,
            in_use=labels_pairs(config.judge),
            checks=_labelled_checks(config),
        ),
    ]


def _refuse_turns(row: HeldOutPrompt) -> None:
    if row.later_turns:
        raise DataError(
            f"'turns' asks {row.num_turns} turns, but people judge single answers",
            where=row.where,
            remedy="choose another judge.kind, or leave out rows of several turns",
        )


def _labelled_checks(config: EvaluateConfig) -> tuple[Callable[[Any], object], ...]:
    """Checks for what the primary metric reads in a labelled row, if it is the judge."""
    metric = primary_metric(config)
    rule = None if metric is None or config.judge.kind is not JudgeKind.metric else rule_of(metric)
    return () if rule is None else (rule.expected,)


def votes_files(config: EvaluateConfig, folder: Path) -> Mapping[str, Path]:
    """The file of votes, if people judge: the configured one, or that of ``align judge`` in ``folder`` if there is one.

    Raises:
        DataError: the configured file does not exist, or the file is damaged."""
    if config.judge.kind is not JudgeKind.people:
        return {}
    path = folder / FILE if config.judge.votes is None else Path(config.judge.votes).expanduser().absolute()
    if not path.is_file():
        if config.judge.votes is None:
            return {}
        raise DataError(
            f"no file {path}",
            where=f"stages.{folder.name}.{VOTES}",
            remedy="name a file of `align judge`, or leave it out to use the votes on this run",
        )
    read_votes(path)
    return {VOTES: path}


def _vote_notes(config: EvaluateConfig, folder: Path) -> Iterator[str]:
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


# ---- faults ----------------------------------------------------------------------------------------------------------


def _faults(config: EvaluateConfig, run: RunConfig, where: str) -> Iterator[Fault]:
    yield from paired_scores.faults(config.metrics, config.primary, config.answers, where)
    yield from sampling_faults(config.sampling, f"{where}.sampling")
    for name, metric in _scorers(config).items():
        if metric.source == REWARD and config.reward is None:
            message = f"'{REWARD}' needs the model in {where}.reward, which is null; name a model, or remove this"
            yield Fault(where=f"{where}.{source_field(name)}", message=message)
    if PROMPTED in config.arms and not config.system_prompt:
        message = f"missing, but the arm '{PROMPTED}' needs it; write a system prompt, or remove that arm"
        yield Fault(where=f"{where}.system_prompt", message=message)
    yield from _gate_faults(config, where)
    yield from _grader_faults(config, where, hang_seconds=run.launch.hang_seconds)
    yield from _judge_faults(config, where, hang_seconds=run.launch.hang_seconds)
    yield from _labelled_faults(config, where)


def _gate_faults(config: EvaluateConfig, where: str) -> Iterator[Fault]:
    names = [metric.name for metric in config.metrics]
    for number, gate in enumerate(config.gate):
        path = f"{where}.gate[{number}]"
        yield from _arm_faults(config, path, gate.arm, gate.against)
        if not names:
            yield Fault(where=path, message=f"compares by a metric, and {where}.metrics is empty; add one")
        elif gate.metric is not None and gate.metric not in names:
            message = f"no metric {gate.metric!r}; {suggestion(gate.metric, names)}"
            yield Fault(where=f"{path}.metric", message=message)


def _arm_faults(config: EvaluateConfig, path: str, arm: str, against: str) -> Iterator[Fault]:
    for name, value in (("arm", arm), ("against", against)):
        if value not in config.arms:
            message = f"{value!r} is not an arm of this evaluation; {suggestion(value, config.arms)}"
            yield Fault(where=f"{path}.{name}", message=message)
    if arm == against:
        yield Fault(where=path, message=f"{arm!r} cannot be compared with itself; name two different arms")


def _grader_faults(config: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    grader, path = config.grader, f"{where}.grader"
    for number, metric in enumerate(config.metrics):
        of_metric = f"{where}.metrics[{number}]"
        if metric.rubric is not None and metric.source != GRADE:
            message = f"has no effect; only the source '{GRADE}' uses it, but source is '{metric.source}'"
            yield Fault(where=f"{of_metric}.rubric", message=message)
        elif metric.source == GRADE and (message := client_missing(GRADE)):
            yield Fault(where=f"{of_metric}.source", message=message)
        splits = grader.lowest < metric.passing_score <= grader.highest
        if metric.source == GRADE and pass_size(metric.aggregate) is not None and not splits:
            grades = f"grades go from {grader.lowest} to {grader.highest}; choose one of them above {grader.lowest}"
            message = f"{metric.passing_score:g} lets all grades pass or none, because {grades}"
            yield Fault(where=f"{of_metric}.passing_score", message=message)
    if is_graded(config):
        yield from endpoint_faults(grader.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        yield from scale_faults(grader, path)
    elif grader != GraderConfig():
        message = f"unused, because no metric has the source '{GRADE}'; add one, or remove the grader"
        yield Fault(where=path, message=message)


def _judge_faults(config: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    judge, path = config.judge, f"{where}.judge"
    if judge.kind is JudgeKind.none:
        if judge.pairs:
            yield Fault(where=f"{path}.pairs", message="unused, because judge.kind is 'none'; set judge.kind")
    else:
        for number, pair in enumerate(judge.pairs):
            yield from _arm_faults(config, f"{path}.pairs[{number}]", pair.arm, pair.against)
        if not pairs_of(judge, config.arms, reference=config.reference):
            message = "no trained arm can be compared with the reference or base+prompt; name pairs: "
            yield Fault(where=f"{path}.pairs", message=f"{message}[{{arm: …, against: …}}]")
    limits = ("max_prompts", "max_invalid")
    if judge.kind is JudgeKind.people:
        yield from unread_notes(judge, JudgeConfig(), limits, path, "only another kind of judge")
        if importlib.util.find_spec("krippendorff") is None:
            message = f"'people' needs the package krippendorff, which is not installed; pip install '{PACKAGE}'"
            yield Fault(where=f"{path}.kind", message=message)
    else:
        yield from unread_faults(judge, JudgeConfig(), ("votes",), path, "only judge.kind 'people'")
    if judge.kind is JudgeKind.none:
        yield from unread_notes(judge, JudgeConfig(), limits, path, "only a judge (judge.kind)")
    if judge.kind is JudgeKind.metric and not config.metrics:
        message = f"'metric' judges by the primary metric, and {where}.metrics is empty; name one"
        yield Fault(where=f"{path}.kind", message=message)
    if judge.kind is JudgeKind.reward and config.reward is None:
        yield Fault(where=f"{path}.kind", message=f"'reward' judges by {where}.reward, which is null; name a model")
    if judge.kind is JudgeKind.endpoint:
        yield from endpoint_faults(judge.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        if message := client_missing("endpoint"):
            yield Fault(where=f"{path}.kind", message=message)
    elif judge.endpoint != EndpointConfig():
        message = f"unused; only judge.kind 'endpoint' uses it, and judge.kind is '{judge.kind.value}'"
        yield Fault(where=f"{path}.endpoint", message=message)


def _labelled_faults(config: EvaluateConfig, where: str) -> Iterator[Fault]:
    judge, path = config.judge, f"{where}.judge.labelled"
    if judge.labelled == LabelledConfig():
        return
    if judge.kind not in _JUDGES:
        kinds = ", ".join(kind.value for kind in _JUDGES)
        message = f"unused: a judge of the kind {judge.kind.value!r} cannot judge pairs from a file; only {kinds} can"
        yield Fault(where=path, message=message)
    elif not judge.labelled.data.source:
        message = "missing, so the other settings are unused; name preference pairs that people have labelled"
        yield Fault(where=f"{path}.data.source", message=message)
    metric = primary_metric(config)
    if judge.kind is JudgeKind.metric and metric is not None and metric.source == CHOICE:
        message = f"the primary metric's source {CHOICE!r} does not score answers; choose another judge.kind"
        yield Fault(where=path, message=message)


def _scorers(config: EvaluateConfig) -> dict[str, MetricConfig]:
    return {f"metrics[{number}]": metric for number, metric in enumerate(config.metrics)}


def _as_read(config: EvaluateConfig) -> EvaluateConfig:
    """Resets settings of arms that are not evaluated; fills in the primary metric's name."""
    return replace(
        config,
        few_shot=config.few_shot if FEW_SHOT in config.arms else FewShotConfig(),
        system_prompt=config.system_prompt if PROMPTED in config.arms else None,
        primary=paired_scores.primary_name(config.metrics, config.primary),
    )


def _check_machine(config: EvaluateConfig, where: str) -> None:
    check_engine(config.sampling, where)
    if config.judge.kind is JudgeKind.endpoint:
        api_key(config.judge.endpoint.api_key_env, where=f"{where}.judge.endpoint.api_key_env")
    if is_graded(config):
        api_key(config.grader.endpoint.api_key_env, where=f"{where}.grader.endpoint.api_key_env")


def _reported(config: EvaluateConfig) -> base.Reported:
    names = tuple(metric.name for metric in config.metrics)
    return base.Reported(held_out=of_arms((*names, "loss", "win_rate"), config.arms), half_by_chance=("win_rate/",))


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows, policies = circumstances.held_out, circumstances.made.get(POLICY, ())
    if rows is None or not policies:
        return None
    models, scorer = circumstances.made.get(REWARD_MODEL, ()), circumstances.answer(SCORER)
    reward = f"stage:{models[0]}" if models else None
    arms = ["base", *(f"stage:{name}" for name in policies)]
    no_metric = "without a metric, no arm is called better; name what makes an answer good (docs/evaluation.md)"
    trained_on = maximises_scores(circumstances)
    why = "also what is trained on: add another metric" if trained_on else "the scorer that you named"
    metric = Reasoned(value=[{"name": "score", "source": scorer}], why=why)
    settings = {
        **data_of(rows),
        "arms": Reasoned(value=arms, why="all answer the same prompts"),
        "reference": Reasoned(value=circumstances.start, why="the KL of each arm is measured from this one"),
        "reward": Reasoned(value=reward, why="its scores are shown" if models else "there is no reward model"),
        "metrics": metric if scorer else Reasoned(value=[], why=no_metric),
        "max_new_tokens": new_tokens(rows_with_answers(circumstances), circumstances),
    }
    return NewStage(why="Every policy answers prompts on which none was trained.", settings=settings, reads=rows)


KIND = base.StageKind(
    name="evaluate",
    summary="arms side by side on held-out prompts",
    config=EvaluateConfig,
    revision=20,
    produces=EVALUATION,
    run="alignment.stages.evaluate.run:run",
    rehearse="alignment.stages.evaluate.prompts:refuse_base",
    data=_data,
    files=base.OtherFiles(paths=votes_files),
    scorers=_scorers,
    faults=_faults,
    as_read=_as_read,
    slots=lambda config: reward_model_slots(_scorers(config)),
    metrics=_reported,
    notes=lambda config, planned: _vote_notes(config, planned.folder),
    launch=base.LaunchShape(runs_on=base.RunsOn.replicas, check_machine=_check_machine),
    display=base.Display(primary=primary_metric),
    proposals=base.Proposals(stage=_stage),
)
