"""Compares arms on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from alignment.core.artifacts import write_lines
from alignment.core.errors import ModelError
from alignment.core.model_files import positions_in, reason_of_positions
from alignment.core.typed_json import to_json
from alignment.costs.recorder import on_shadows
from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.arms import TOKENS, Answered, Scores, grouped, known, reward_scores, side_by_side
from alignment.evaluation.conclusions import (
    conclusions,
    contradictions,
    coverage_conclusions,
    grade_conclusions,
    labelled_conclusions,
)
from alignment.evaluation.endpoint import Endpoint
from alignment.evaluation.exchanges import LetterRows, asked_turns, choice_scores, letter_rows
from alignment.evaluation.paired_scores import labels, primary_name, recorded
from alignment.evaluation.statistics import Intervals, compare
from alignment.evaluation.tables import arm_result, by_task, refuse_not_finite, samples
from alignment.models.assembly.heads import HEAD, load_reward_model
from alignment.models.assembly.load import lineage, products_in, refuse_other_tokenizer
from alignment.models.forward.answers import micro_batches_of, unwrapped
from alignment.models.kernels.layout import prepacked
from alignment.records.evaluation import ArmResult, Evaluation, Grading, JudgedPair, Sample, write_samples
from alignment.rewards.scorer_sources import CHOICE, REWARD
from alignment.rewards.scorers import Answers
from alignment.stages.evaluate import labelled as labelled_pairs
from alignment.stages.evaluate import metric_scores
from alignment.stages.evaluate.answering import Answerer
from alignment.stages.evaluate.caches import cached_scores
from alignment.stages.evaluate.judging import Judged, ScoredAnswers, judge, open_endpoint
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.evaluate.labelled import judge_labelled
from alignment.stages.evaluate.prompts import ArmPrompts, held_out_prompts, prompts_of_arms
from alignment.stages.shared.policies import Policies, served_policies
from alignment.stages.shared.policy_logprobs import PolicyRows, in_shares, on_main, policy_logprobs
from alignment.stages.shared.result import StageResult
from alignment.training.context import StageContext


def evaluation_of(
    config: EvaluateConfig,
    scored: ScoredAnswers,
    judged: Judged,
    labelled: JudgedPair | None,
    gradings: Sequence[Grading],
) -> Evaluation:
    primary = scored.primary
    by_primary = {} if primary is None else primary.by_arm
    metric = None if primary is None else primary.metric
    compared = {} if metric is None else {metric.name: _known(by_primary)}
    comparisons = compare(compared, reference=scored.reference, intervals=scored.intervals)
    num_compared = len(next((scores for by_arm in compared.values() for scores in by_arm.values()), scored.rows))
    num_scored = _num_scored(scored, [grading.metric for grading in gradings])
    rewards = {name: scored.arms[name].means(scores) for name, scores in scored.rewards.items() if scores is not None}
    judge_table = judged.table and replace(judged.table, labelled=labelled)
    label_of = labels(config.arms)
    evaluation = Evaluation(
        num_prompts=len(scored.rows),
        metrics=list(scored.metrics),
        primary=None if metric is None else metric.name,
        arms=[
            arm_result(
                name,
                arm,
                label=label_of[name],
                scores=scored.turn_scores[name],
                rewards=scored.rewards[name],
                log_ratios=scored.log_ratios[name],
                win_rate=judged.win_rate(name, reference=scored.reference),
                intervals=scored.intervals,
                sampled=config.answers.temperature > 0.0,
            )
            for name, arm in scored.arms.items()
        ],
        comparisons=comparisons,
        other_comparisons=compare(
            {other.name: _known(scored.by_metric(other.name)) for other in scored.metrics if other != metric},
            reference=scored.reference,
            intervals=scored.intervals,
        ),
        reward_comparisons=compare(
            {REWARD: rewards} if rewards else {}, reference=scored.reference, intervals=scored.intervals
        ),
        tasks=by_task(scored.rows, by_primary),
        judge=judge_table,
        gradings=list(gradings),
        num_scored=num_scored,
        conclusions=[
            *conclusions(num_compared, metric, comparisons, judge_table, label_of),
            *labelled_conclusions(judge_table),
            *grade_conclusions(gradings, len(scored.rows), label_of),
            *coverage_conclusions(num_scored, len(scored.rows)),
        ],
    )
    return replace(evaluation, conclusions=[*evaluation.conclusions, *contradictions(evaluation)])


def _num_scored(scored: ScoredAnswers, graded: Sequence[str]) -> dict[str, int]:
    """How many prompts have a score by each metric that some lack one of, other than the ``graded`` metrics."""
    counts = {
        metric.name: len(known(next(iter(scored.by_metric(metric.name).values()), [])))
        for metric in scored.metrics
        if metric.name not in graded
    }
    return {name: count for name, count in counts.items() if count < len(scored.rows)}


def _known(by_arm: Scores) -> dict[str, list[float]]:
    """The scores that there are, which are on the same prompts for every arm."""
    return {arm: known(values) for arm, values in by_arm.items()}


def run(config: EvaluateConfig, context: StageContext) -> StageResult:
    """Policies and a reward model in, ``evaluation.json`` and ``samples.jsonl`` out. A judge also writes
    ``judgements.jsonl``, a grader ``grades.jsonl``. All processes answer and run models; the main one scores by rules
    and functions, asks servers and writes."""
    spec = context.spec
    context.progress("loading")
    endpoint = on_main(context, lambda: open_endpoint(config.judge, context))
    grader = on_main(context, lambda: metric_scores.open_grader(config, context))
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    for field in ("reference", "reward"):
        if field in spec.inputs:
            refuse_other_tokenizer(spec, spec.inputs[field], tokenizer)
    computed = _computed(config, context, tokenizer)
    concluded = on_main(context, lambda: _concluded(config, context, tokenizer, computed, endpoint, grader))
    return concluded or StageResult(metrics={})


def _computed(config: EvaluateConfig, context: StageContext, tokenizer: Any) -> metric_scores.Computed:
    rows = held_out_prompts(config, context)
    arm_prompts = prompts_of_arms(config, context, tokenizer, rows)
    served = served_policies(config.sampling, context)
    policies = Policies(context, served)
    with served or nullcontext():
        arms, choices = _answers(config, context, policies, arm_prompts, rows)
    context.progress("scoring")
    answers = metric_scores.answers_to_score(tokenizer, rows, arm_prompts, arms)
    log_ratios = _log_ratios(config, context, policies, arm_prompts, arms, answers)
    policies.release()
    return metric_scores.Computed(
        rows=rows,
        arms=arms,
        answers=answers,
        log_ratios=log_ratios,
        rewards=_rewards(context, answers),
        models=metric_scores.scores_by_models(config, context, tokenizer, rows, answers),
        choices=choices,
    )


def _concluded(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    computed: metric_scores.Computed,
    endpoint: Endpoint | None,
    grader: Endpoint | None,
) -> StageResult:
    """What the main process does alone."""
    scored, grades = _scored(config, context, tokenizer, computed, grader)
    judged = judge(config.judge, context, scored, endpoint)
    labelled, labelled_lines = judge_labelled(config, context, tokenizer, endpoint, grader, scored.intervals)
    evaluation = evaluation_of(config, scored, judged, labelled, grades.gradings)
    for file, lines in ((metric_scores.LINES, grades.lines), (labelled_pairs.LINES, labelled_lines)):
        if lines:
            write_lines(context.content / file, lines)
    return _written(context, evaluation, samples(scored.rows, scored.arms, scored.turn_scores), judged)


def _scored(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: Any,
    computed: metric_scores.Computed,
    grader: Endpoint | None,
) -> tuple[ScoredAnswers, metric_scores.Grades]:
    """The scores of all answers, and how a grader came to those that it gave."""
    for name, arm in computed.arms.items():
        if not on_shadows():
            refuse_not_finite(name, arm, rewards=computed.rewards[name], log_ratios=computed.log_ratios[name])
    grades = metric_scores.grade_answers(config, context, grader, computed.answers, asked_turns(computed.rows))
    scored = ScoredAnswers(
        rows=computed.rows,
        arms=computed.arms,
        rewards=computed.rewards,
        log_ratios=computed.log_ratios,
        turn_scores=metric_scores.scores_by_arm(config, context, tokenizer, computed, grades.by_metric),
        metrics=recorded(config.metrics),
        primary_name=primary_name(config.metrics, config.primary),
        reference=context.spec.inputs["reference"].ref,
        intervals=Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap")),
    )
    return scored, grades


def _answers(
    config: EvaluateConfig,
    context: StageContext,
    policies: Policies,
    arm_prompts: Mapping[str, ArmPrompts],
    rows: Sequence[HeldOutPrompt],
) -> tuple[dict[str, Answered], dict[str, list[float]]]:
    """Every arm's answers, and which rows' right choice it finds likeliest if a metric asks for that."""
    arms: dict[str, Answered] = {}
    choices: dict[str, list[float]] = {}
    with_choices = any(metric.source == CHOICE for metric in config.metrics)
    num_turns = sum(row.num_turns for row in rows)
    answerer = Answerer(config=config, context=context, policies=policies)
    for names in grouped(list(arm_prompts), answerer.arms_at_once(len(rows))):
        some = {name: arm_prompts[name] for name in names}

        def progress(done: int, before: int = len(arms) * num_turns) -> None:
            context.progress("answering", before + done, len(arm_prompts) * num_turns)

        compared = {
            name for name, arm in some.items() if _is_compared(arm, config) and not _is_reference(name, context)
        }
        arms |= answerer.answers_of_arms(some, rows, with_logprobs=compared, progress=progress)
        if with_choices:
            choices |= _choices(context, policies, some, rows)
        progress(len(names) * num_turns)
    return arms, choices


def _choices(
    context: StageContext, policies: Policies, arm_prompts: Mapping[str, ArmPrompts], rows: Sequence[HeldOutPrompt]
) -> dict[str, list[float]]:
    """Whether each arm finds a row's right choice likeliest: 1 or 0 for each row."""
    asked = {name: letter_rows(arm.tokenizer, rows, arm.shown) for name, arm in arm_prompts.items()}
    rows_of_arms = {}
    for name, arm in arm_prompts.items():
        _refuse_long_choices(arm, asked[name], rows)
        prompts, letters = asked[name].flat()
        rows_of_arms[name] = PolicyRows(policy=arm.policy, prompts=prompts, answers=letters)
    logprobs = policy_logprobs(context, "choosing", policies, rows_of_arms)
    return {name: choice_scores(rows, asked[name], logprobs[name], name=name) for name in arm_prompts}


def _refuse_long_choices(arm: ArmPrompts, asked: LetterRows, rows: Sequence[HeldOutPrompt]) -> None:
    positions, base = positions_in(arm.policy.base), arm.policy.base
    tokens, longest = max(zip(asked.lengths, range(len(rows)), strict=True))
    if positions is not None and tokens > positions:
        raise ModelError(
            f"{arm.policy.source} has {positions} positions{reason_of_positions(base)}, but a question with its "
            f"choices needs {tokens}",
            where=rows[longest].where,
            remedy="leave out the row, or lower few_shot.count",
        )


def _is_compared(arm_prompts: ArmPrompts, config: EvaluateConfig) -> bool:
    """Whether log-ratios of the arm's answers mean something: prompts and tokens are the reference's, and the answers
    are greedy or samples of the policy itself, not of one at another temperature."""
    return arm_prompts.plain and not arm_prompts.own_tokens and config.answers.temperature in (0.0, 1.0)


def _is_reference(name: str, context: StageContext) -> bool:
    """Whether an arm with the plain prompts is the reference of the log-ratios."""
    return context.spec.arms[name].path == context.spec.inputs["reference"].path


def _log_ratios(
    config: EvaluateConfig,
    context: StageContext,
    policies: Policies,
    arm_prompts: Mapping[str, ArmPrompts],
    arms: Mapping[str, Answered],
    answers: Mapping[str, Answers],
) -> dict[str, list[float] | None]:
    """Log π − log π_ref of each arm's own answers, nats per sequence; None for other prompts, tokens or temperatures.
    An answer of a later turn follows the arm's own conversation, for the reference too, so that the sum over the turns
    is that of all that the arm wrote. Of greedy answers this is not the KL, an expectation over samples, which is
    usually smaller because a greedy answer is the arm's likeliest. The reference reads all arms' answers to a prompt in
    adjacent rows, so that the prompt is computed once."""
    ratios: dict[str, list[float] | None] = dict.fromkeys(arms)
    for name, arm in arms.items():
        if _is_compared(arm_prompts[name], config) and _is_reference(name, context):
            ratios[name] = [0.0] * len(arm.answers)
    compared = {name: (arm, arm.logprobs) for name, arm in arms.items() if arm.logprobs is not None}
    if not compared:
        return ratios
    prompts, ids = side_by_side(
        [answers[name].prompt_ids for name in compared], [arm.ids for arm, _ in compared.values()]
    )
    reference = lineage(context.spec, context.spec.inputs["reference"])
    asked = {"reference": PolicyRows(policy=reference, prompts=prompts, answers=ids)}
    under = cached_scores(
        context,
        "log-probabilities",
        reference,
        prompts,
        ids,
        lambda: policy_logprobs(context, "comparing with the reference", policies, asked)["reference"],
    )
    for index, (name, (_, own)) in enumerate(compared.items()):
        reference_logprobs = under[index :: len(compared)]
        ratios[name] = [score - other for score, other in zip(own, reference_logprobs, strict=True)]
    return ratios


def _rewards(context: StageContext, answers: Mapping[str, Answers]) -> dict[str, list[float] | None]:
    """The reward model's scores of every arm's answers, after the plain prompts, so that they can be compared."""
    if "reward" not in context.spec.inputs:
        return dict.fromkeys(answers)
    prompts, ids = side_by_side(
        [arm.prompt_ids for arm in answers.values()], [arm.answer_ids for arm in answers.values()]
    )

    def scores_of(share: Sequence[range]) -> list[float]:
        model = load_reward_model(context.spec, context.spec.inputs["reward"], device=context.device)
        model = model.to(context.device)
        scores: list[float] = []
        with products_in(context.spec.model.dtype, context.device), prepacked(unwrapped(model).base_model, TOKENS):
            for done, span in enumerate(share):
                context.progress("scoring by the reward model", done, len(share))
                some = slice(span.start, span.stop)
                scores += reward_scores(model, prompts[some], ids[some])
        return scores

    reward = context.spec.inputs["reward"]
    scores = cached_scores(
        context,
        "rewards",
        lineage(context.spec, reward),
        prompts,
        ids,
        lambda: in_shares(context, micro_batches_of(zip(prompts, ids, strict=True), tokens=TOKENS), scores_of),
        head=None if reward.path is None else reward.path / HEAD,
    )
    return {name: scores[index :: len(answers)] for index, name in enumerate(answers)}


def _written(context: StageContext, evaluation: Evaluation, answers: list[Sample], judged: Judged) -> StageResult:
    evaluation.write(context.content)
    write_samples(context.content, answers)
    if judged.table is not None:
        write_lines(context.content / "judgements.jsonl", judged.lines)
    context.trackers.table("arms", [_row(arm) for arm in evaluation.arms])
    context.trackers.table("samples", [to_json(answer) for answer in answers])
    return StageResult(metrics=_headlines(evaluation))


def _row(arm: ArmResult) -> dict[str, Any]:
    """A row of the table that trackers show, with metrics next to the other figures."""
    row = to_json(arm)
    return {"name": row.pop("name"), "label": row.pop("label"), **row.pop("metrics"), **row}


def _headlines(evaluation: Evaluation) -> dict[str, float]:
    """The metrics of the manifest: ``METRIC/ARM`` for each metric of the recipe, the loss and the win rate."""
    headlines: dict[str, float] = {}
    for name in (*(metric.name for metric in evaluation.metrics), "loss", "win_rate"):
        means = {arm.label: arm.all_metrics[name].mean for arm in evaluation.arms if name in arm.all_metrics}
        headlines |= {f"{name}/{label}": mean for label, mean in means.items()}
    return headlines
