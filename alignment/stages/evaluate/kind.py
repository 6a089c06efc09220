"""The stage kind ``evaluate``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from alignment.config.evaluating import FEW_SHOT, PROMPTED, FewShotConfig, JudgeConfig, JudgeKind
from alignment.config.faults import Fault, suggestion, unread_notes
from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Reasoned
from alignment.config.run import RunConfig
from alignment.config.scoring import MetricConfig
from alignment.core.artifacts import EVALUATION, POLICY, REWARD_MODEL
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair
from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.evaluation import paired_scores
from alignment.evaluation.endpoint_client import api_key
from alignment.rewards.scorer_sources import REWARD, source_field
from alignment.stages import base
from alignment.stages.evaluate import checks
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared.kind_answers import check_engine, of_arms, reward_model_slots, sampling_faults
from alignment.stages.shared.new_settings import data_of, maximises_scores, new_tokens, rows_with_answers


def _data(config: EvaluateConfig) -> list[base.DataSlot]:
    return [
        base.DataSlot(field="data", data=config.data, record=HeldOutPrompt, checks=checks.single_answer_checks(config)),
        base.DataSlot(
            field="few_shot.data",
            data=config.few_shot.data,
            record=Conversation,
            rows=CONVERSATIONS,
            in_use=FEW_SHOT in config.arms,
        ),
        base.DataSlot(
            field=checks.DATA,
            data=config.judge.labelled.data,
            record=PreferencePair,
            in_use=checks.labels_pairs(config.judge),
            checks=checks.labelled_checks(config),
        ),
    ]


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


def _faults(config: EvaluateConfig, run: RunConfig, where: str) -> Iterator[Fault]:
    yield from paired_scores.faults(config.metrics, config.primary, config.answers, where)
    yield from sampling_faults(config.sampling, f"{where}.sampling")
    for field, metric in _scorers(config).items():
        if metric.source == REWARD and config.reward is None:
            message = f"'{REWARD}' needs the model in {where}.reward, which is null; name a model, or remove this"
            yield Fault(where=f"{where}.{source_field(field)}", message=message)
    if PROMPTED in config.arms and not config.system_prompt:
        message = f"missing, but the arm '{PROMPTED}' needs it; write a system prompt, or remove that arm"
        yield Fault(where=f"{where}.system_prompt", message=message)
    yield from _gate_faults(config, where)
    yield from checks.grader_faults(config, where, hang_seconds=run.launch.hang_seconds)
    yield from checks.judge_faults(config, where, hang_seconds=run.launch.hang_seconds)
    yield from checks.labelled_faults(config, where)
    if config.judge.kind is JudgeKind.none:
        names, reader = ("max_prompts", "max_invalid"), "only a judge (judge.kind)"
        yield from unread_notes(config.judge, JudgeConfig(), names, f"{where}.judge", reader)


def _gate_faults(config: EvaluateConfig, where: str) -> Iterator[Fault]:
    names = [metric.name for metric in config.metrics]
    for number, gate in enumerate(config.gate):
        path = f"{where}.gate[{number}]"
        for field, arm in (("arm", gate.arm), ("against", gate.against)):
            if arm not in config.arms:
                message = f"{arm!r} is not an arm of this evaluation; {suggestion(arm, config.arms)}"
                yield Fault(where=f"{path}.{field}", message=message)
        if gate.arm == gate.against:
            yield Fault(where=path, message=f"{gate.arm!r} cannot be compared with itself; name two different arms")
        if not names:
            yield Fault(where=path, message=f"compares by a metric, and {where}.metrics is empty; add one")
        elif gate.metric is not None and gate.metric not in names:
            message = f"no metric {gate.metric!r}; {suggestion(gate.metric, names)}"
            yield Fault(where=f"{path}.metric", message=message)


def _check_machine(config: EvaluateConfig, where: str) -> None:
    check_engine(config.sampling, where)
    if config.judge.kind is JudgeKind.endpoint:
        api_key(config.judge.endpoint.api_key_env, where=f"{where}.judge.endpoint.api_key_env")
    if checks.is_graded(config):
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
    rehearse="alignment.stages.evaluate.prompt_lengths:refuse_base",
    data=_data,
    files=base.OtherFiles(paths=checks.votes_files),
    scorers=_scorers,
    faults=_faults,
    as_read=_as_read,
    slots=lambda config: reward_model_slots(_scorers(config)),
    metrics=_reported,
    notes=lambda config, planned: checks.vote_notes(config, planned.folder),
    launch=base.LaunchShape(runs_on=base.RunsOn.replicas, check_machine=_check_machine),
    display=base.Display(primary=checks.primary_metric),
    proposals=base.Proposals(stage=_stage),
)
