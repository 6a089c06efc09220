"""The verdict on a run in plain sentences. Only a difference that is more than chance is called real."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.evaluation.conclusions import contradictions
from alignment.records import training
from alignment.records.evaluation import BETTER, NO_DIFFERENCE, WORSE, Comparison, Evaluation
from alignment.report.doubts import (
    SMOKE,
    compares_answers,
    is_smoke,
    most_varied,
    of_evaluation,
    repeats_itself,
    scores_answers,
    too_few_prompts,
    winners_that_repeat_themselves,
)
from alignment.report.kit import text
from alignment.report.run_page.run_records import Run, Stage
from alignment.report.run_page.run_tables import card_lead
from alignment.stages.base import LearnsFrom
from alignment.stages.registry import doubts, learns_from

TRAINING = {LearnsFrom.preferences: "Preference training", LearnsFrom.scores: "Reinforcement learning"}
"""What the lead calls training that goes on from demonstrations, by what teaches it."""
MAX_LOG_RATIO = 25.0
"""Above this log-ratio, in nats per sequence, an arm is called far from the reference (chosen, not tuned)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``lead`` is the answer in a sentence or two; the lists give the reasons, one sentence per entry."""

    lead: str
    differences: list[str]
    warnings: list[str]


def judge(run: Run) -> Verdict:
    evaluation = run.evaluation
    warnings = _unfinished(run)
    if is_smoke(run.record.profile):
        return Verdict(lead=f"This is {SMOKE}.", differences=[], warnings=warnings)
    if evaluation is not None:  # what the plan said against it, such as prompts that were also trained on
        warnings += [f"{caution[0].upper()}{caution[1:]}." for caution in run.record.cautions if caution]
    for stage in run.stages:
        warnings += [f"{stage.name}: {doubt}." for doubt in doubts(stage.kind, stage.headlines)]
    for arm in (arm for measured in run.forgetting for arm in measured.failed):
        warnings.append(f"{arm.label} forgot too much: {'; '.join(arm.reasons)}.")
    if evaluation is not None:
        warnings += _arm_warnings(evaluation) + _overoptimised(run, evaluation)
    warnings += _handed_on(run)
    warnings += [f"{card.stage}: {sentence}" for card in run.cards for sentence in card.record.warnings]
    if evaluation is None:
        leads = [*map(card_lead, run.cards), *(table.lead for of_stage in run.tables for table in of_stage.tables)]
        sentence = f"{run.evaluation_note} Nothing can be said yet about which stage helped."
        return Verdict(lead=" ".join(filter(None, leads)) or sentence, differences=[], warnings=warnings)
    differences = [] if too_few_prompts(evaluation) else _differences(evaluation)
    return Verdict(lead=_lead(run, evaluation), differences=differences, warnings=warnings)


def _lead(run: Run, evaluation: Evaluation) -> str:
    if len(evaluation.arms) == 1:
        return f"Only {evaluation.arms[0].label} was evaluated, so there is nothing to compare it with."
    if few := too_few_prompts(evaluation):
        return f"{few[0].upper()}{few[1:]}."
    repeated = [f"But {doubt}." for doubt in winners_that_repeat_themselves(evaluation)]
    return " ".join([_by_metric(run, evaluation), *contradictions(evaluation), *repeated])


def _by_metric(run: Run, evaluation: Evaluation) -> str:
    if evaluation.primary_metric is None:
        return _without_metric(evaluation)
    if not evaluation.comparisons:
        return "The evaluation contains no comparisons, so no difference between arms is shown."
    against_start = _against_start(run, evaluation)
    if not against_start:
        return _all_pairs_lead(evaluation)
    sentences = [
        _group_lead(evaluation, start, group, TRAINING[teacher]) for (start, teacher), group in against_start.items()
    ]
    return " ".join([*sentences, *_against_untrained(evaluation)])


def _all_pairs_lead(evaluation: Evaluation) -> str:
    worse_by_better: dict[str, list[str]] = {}
    for item in evaluation.comparisons:
        if item.real:
            better = item if evaluation.verdict(item) == BETTER else item.turned()
            worse_by_better.setdefault(evaluation.label(better.arm), []).append(evaluation.label(better.against))
    if not worse_by_better:
        return f"By {evaluation.primary}, no arm is shown to be better than another."
    parts = [f"{arm} is better than {text.listing(worse)}" for arm, worse in worse_by_better.items()]
    return f"By {evaluation.primary}, {'; '.join(parts)}."


def _without_metric(evaluation: Evaluation) -> str:
    if evaluation.judge is None:
        return "The evaluation has no metric and no judge, so no arm is called better than another."
    pairs = evaluation.judge.pairs
    decided = sum(pair.verdict in (BETTER, WORSE) for pair in pairs)
    return (
        f"The evaluation has no metric. By {evaluation.judge.name}, {decided} of {len(pairs)} pairs of arms "
        f"show{'s' if decided == 1 else ''} a real difference."
    )


def _against_start(run: Run, evaluation: Evaluation) -> dict[tuple[str, LearnsFrom], list[Comparison]]:
    """The comparisons of arms that learned from preferences or scores with the demonstrated arm that they started from,
    each as *trained minus start*, by that start and what taught them."""
    starts = {f"stage:{stage.name}": _demonstrated_start(run, stage) for stage in run.stages}
    groups: dict[tuple[str, LearnsFrom], list[Comparison]] = {}
    for item in evaluation.comparisons:
        for pair in (item, item.turned()):
            start, teacher = starts.get(pair.arm, ("", None))
            if teacher is not None and start == pair.against:
                groups.setdefault((start, teacher), []).append(pair)
    return groups


def _demonstrated_start(run: Run, stage: Stage) -> tuple[str, LearnsFrom | None]:
    """The last policy before a stage, down its line, that learned from demonstrations, and what taught the stage; no
    teacher without such a policy, and for a stage that learned from demonstrations itself."""
    stages = {f"stage:{other.name}": other for other in run.stages}
    teacher = learns_from(stage.kind, stage.config)
    before: Stage | None = stage if teacher in TRAINING else None
    for _ in stages:
        start = "" if before is None else dict(before.inputs).get("init", "")
        before = stages.get(start)
        if before is not None and learns_from(before.kind, before.config) is LearnsFrom.demonstrations:
            return start, teacher
    return "", None


def _against_untrained(evaluation: Evaluation) -> list[str]:
    groups: dict[str, list[Comparison]] = {}
    for item in evaluation.comparisons:
        for pair in (item, item.turned()):
            if pair.against in UNTRAINED_ARMS and pair.arm not in UNTRAINED_ARMS:
                groups.setdefault(pair.against, []).append(pair)
    return [
        f"Against {evaluation.label(against)}: {'; '.join(_outcomes(evaluation, against, group))}."
        for against, group in groups.items()
    ]


def _group_lead(evaluation: Evaluation, start: str, group: list[Comparison], training: str) -> str:
    parts = "; ".join(_outcomes(evaluation, start, group))
    verdicts = {evaluation.verdict(item) for item in group}
    in_words = {
        frozenset({BETTER}): "helped",
        frozenset({WORSE}): "hurt",
        frozenset({NO_DIFFERENCE}): "is not shown to have helped",
    }
    return f"{training} {in_words.get(frozenset(verdicts), 'had mixed results')}: {parts}."


def _outcomes(evaluation: Evaluation, against: str, group: list[Comparison]) -> list[str]:
    """``dpo and ppo beat sft``: which arms are better than ``against``, which are worse, and which are neither."""
    helped = [evaluation.label(item.arm) for item in group if evaluation.verdict(item) == BETTER]
    hurt = [evaluation.label(item.arm) for item in group if evaluation.verdict(item) == WORSE]
    unclear = [evaluation.label(item.arm) for item in group if not item.real]
    base = evaluation.label(against)
    outcomes = (
        (helped, f"beat{'s' * (len(helped) == 1)} {base}"),
        (hurt, f"fall{'s' * (len(hurt) == 1)} behind {base}"),
        (unclear, f"cannot be told apart from {base}"),
    )
    return [f"{text.listing(arms)} {outcome}" for arms, outcome in outcomes if arms]


def _differences(evaluation: Evaluation) -> list[str]:
    """A sentence for each real difference, largest first, and one sentence for all differences that are not shown."""
    real = sorted((c for c in evaluation.comparisons if c.real), key=lambda c: -abs(c.difference))
    sentences = [_difference(evaluation, item) for item in real]
    unclear = [c for c in evaluation.comparisons if not c.real]
    for excludes, reason in ((False, "the interval includes zero"), (True, "its p value, corrected, is 0.05 or more")):
        pairs = [
            f"{evaluation.label(c.arm)} and {evaluation.label(c.against)}"
            for c in unclear
            if c.interval.excludes_zero() is excludes
        ]
        if pairs:
            sentences.append(f"Not shown, because {reason}: a difference between {'; '.join(pairs)}.")
    return sentences


def _difference(evaluation: Evaluation, item: Comparison) -> str:
    return (
        f"{evaluation.label(item.arm)} is really {evaluation.verdict(item)} than {evaluation.label(item.against)}: "
        f"{text.signed(item.difference)} in {evaluation.primary} (95\u202f% interval "
        f"{text.bounds(item.interval, 3, text.signed)})."
    )


def _unfinished(run: Run) -> list[str]:
    stages = run.unfinished
    if not stages:
        return []
    states = [f"{stage.name} ({stage.state})" for stage in stages]
    return [f"The run is not complete: {text.listing(states)}. This page shows what is available."]


def _arm_warnings(evaluation: Evaluation) -> list[str]:
    warnings = []
    most = most_varied(evaluation) if compares_answers(evaluation) else None
    for arm in evaluation.arms:
        if most is not None and repeats_itself(arm, most):
            warnings.append(
                f"{arm.label} is degenerate: only {text.share(arm.distinct)} of its answers are distinct, against "
                f"{text.share(most.distinct)} of those of {most.label}, so it says the same thing to different prompts "
                "and its scores mean little."
            )
        # An untrained arm is far from the reference because the reference was trained.
        ratio = arm.greedy_log_ratio or arm.kl
        if ratio is not None and ratio.mean > MAX_LOG_RATIO and arm.name not in UNTRAINED_ARMS:
            measured = "its greedy answers have a log-ratio" if arm.greedy_log_ratio else "it has a KL divergence"
            warnings.append(
                f"{arm.label} has moved far from the reference: {measured} of "
                f"{text.number(ratio.mean, 1)} nats (more than {MAX_LOG_RATIO:.0f}): read its answers before "
                "trusting its score."
            )
    in_the_lead = [too_few_prompts(evaluation), *winners_that_repeat_themselves(evaluation)]
    doubts_of_answers = [doubt for doubt in of_evaluation(evaluation) if doubt not in in_the_lead]
    warnings += [f"{doubt[0].upper()}{doubt[1:]}." for doubt in doubts_of_answers]
    # most or all cut off is a doubt of the evaluation; a share, because a prompt may have several answers and turns
    never_ended = [
        f"{text.share(1 - arm.ended.mean)} of those from {arm.label}"
        for arm in evaluation.arms
        if arm.ended is not None and 0.5 <= arm.ended.mean < 1
    ]
    if never_ended and scores_answers(evaluation):
        warnings.append(f"Some answers never ended and were cut off at the limit: {text.listing(never_ended)}.")
    return warnings


def _overoptimised(run: Run, evaluation: Evaluation) -> list[str]:
    """Arms that the reward model really scores above sft although the primary metric is really worse: the proxy was
    optimised, not the goal."""
    liked = [both for item in evaluation.reward_comparisons for both in (item, item.turned())]
    better = {(item.arm, item.against) for item in liked if item.real and item.difference > 0}
    return [
        f"The reward model scores {evaluation.label(item.arm)} above {evaluation.label(start)} although its "
        f"{evaluation.primary} is really worse: a sign of over-optimisation."
        for (start, _), group in _against_start(run, evaluation).items()
        for item in group
        if evaluation.verdict(item) == WORSE and (item.arm, item.against) in better
    ]


def _handed_on(run: Run) -> list[str]:
    warnings = []
    for stage in run.stages:
        headlines = stage.headlines
        best_update, done = headlines.get("guard/kept_update"), headlines.get("updates")
        planned = stage.config.get("updates")
        if best_update is not None and done is not None and best_update < done:
            best, last = headlines.get("guard/best_scorer"), headlines.get("guard/scorer")
            warnings.append(
                f"{stage.name} keeps its policy after update {best_update:.0f} of {done:.0f}: the held-out scorer "
                f"gave {text.number(best, 3)} there and {text.number(last, 3)} at the end, "
                "on the prompts that were used to select it."
            )
        if done is not None and isinstance(planned, int) and done < planned:
            why = "its KL was above guard.max_kl twice in a row"
            warnings.append(f"{stage.name} ended after {done:.0f} of {planned} updates: {why}.")
        settings = stage.config.get("validation")
        patience = settings.get("patience") if isinstance(settings, dict) else None
        sentences = training.outcome(stage.headlines, patience=patience if isinstance(patience, int) else None)
        warnings += [f"{stage.name} {sentence}." for sentence in sentences]
    return warnings
