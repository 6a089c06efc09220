"""A reward model's report card. The processes share the pairs that it scores, and the main process does the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from alignment.config.model import Dtype
from alignment.config.scoring import ScoreSourceConfig
from alignment.core.artifacts import read_manifest, write_lines
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.core.typed_json import to_json
from alignment.data.overlap import asked, asked_too
from alignment.data.records import PreferencePair, Prompt
from alignment.data.tokens.row_kinds import PAIRS, PROMPT, Limits, refuse_losses
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.arms import grouped
from alignment.evaluation.bag_of_words import BagOfWords, fit
from alignment.evaluation.card_measures import Judged, card_of, warnings
from alignment.evaluation.invariance import Rows, beyond_rounding, flat_scores, moved, padded_scores
from alignment.evaluation.statistics import Intervals
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import products_in, refuse_other_tokenizer
from alignment.models.assembly.prefix import prefix_of
from alignment.models.forward.answers import unwrapped
from alignment.records.reward_card import Invariances, Learned, Rescored, RewardCard
from alignment.records.stages import LEFT_OUT_FILE as LEFT_OUT
from alignment.rewards.build import build_scorer
from alignment.rewards.reward_models import Computation, TextScorer, load_external
from alignment.rewards.scorers import Answers
from alignment.stages.reward_card.kind import RULE, RewardCardConfig
from alignment.stages.shared.answer_sampling import asking_of, counted_progress, scores_of
from alignment.stages.shared.policy_logprobs import in_shares, on_main
from alignment.stages.shared.result import StageResult
from alignment.stages.shared.stage_rows import fitting, rows_of
from alignment.training.context import StageContext


def scores_by_rule(rule: ScoreSourceConfig, context: StageContext, pairs: Sequence[PreferencePair]) -> list[float]:
    """The rule's score of each chosen and rejected answer in turn."""
    prompts = [
        Prompt(messages=pair.messages, tools=pair.tools, row=pair.row, where=pair.where)
        for pair in pairs
        for _ in ("chosen", "rejected")
    ]
    run = Computation(device=context.device, dtype=context.spec.model.dtype, tokens=1)
    # A rule needs neither tokenizer nor model.
    scorer = build_scorer(RULE, rule, context.spec, None, prompts, run, asking_of(context))
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    no_tokens: list[list[int]] = [[] for _ in texts]
    answers = Answers(prompt_ids=no_tokens, answer_ids=no_tokens, texts=texts, prompts=prompts, rows=range(len(texts)))
    progress = counted_progress(context, "scoring by the rule", len(texts))
    return scores_of(scorer, answers, source=rule.source, progress=progress)


LEARNED = "learned"
MAX_LEARNED = 20_000
"""The bag of words learns from at most this many pairs, the first ones, which takes about a minute."""
AT_ONCE = 128
"""Rows of a part, which one process scores as a whole."""
NUM_WORDS = 10
"""How many words the card lists for an answer, and how many against."""


def run(config: RewardCardConfig, context: StageContext) -> StageResult:
    """A reward model and pairs in, ``card.json`` and ``pairs.jsonl`` out."""
    records = rows_of(context, PreferencePair, config.data)
    knows_learned = LEARNED in context.spec.extra_data
    learned = rows_of(context, PreferencePair, config.learned, field=LEARNED) if knows_learned else []
    unseen, overlap = _without_learned(config, context, records, learned)
    context.progress("loading")
    reading = _read(config, context, unseen)
    scores = _scores(config, context, reading)

    def conclude() -> StageResult:
        context.progress("fitting the bag of words")
        seen = learned[:MAX_LEARNED]
        texts, prompts = [(pair.chosen, pair.rejected) for pair in seen], [repr(pair.messages) for pair in seen]
        bag = fit(texts, prompts, seed=context.seed("folds")) if seen else None
        judged = _judged(config, context, reading, scores, bag)
        if overlap is None or bag is None:  # a bag of words, just where the learned pairs are known
            return _written(config, context, reading, judged, None)
        speaks_for, against = bag.heaviest(NUM_WORDS)
        words: dict[str, Any] = {"for_answer": speaks_for, "against": against}
        known = replace(overlap, words=len(bag.words), penalty=bag.penalty, **words)
        return _written(config, context, reading, judged, known)

    return on_main(context, conclude) or StageResult(metrics={})


def _written(
    config: RewardCardConfig, context: StageContext, reading: _Reading, pairs: list[Judged], learned: Learned | None
) -> StageResult:
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    card = replace(
        card_of(pairs, intervals=intervals, num_worst=config.num_worst),
        reward=context.spec.inputs["reward"].ref,
        rows_too_long=reading.too_long,
        learned=learned,
        invariances=_invariances(config, context, reading) if config.invariance_pairs else None,
    )
    card = replace(card, warnings=warnings(card))
    card.write(context.content)
    write_lines(context.content / "pairs.jsonl", (to_json(pair.record) for pair in pairs))
    return StageResult(metrics=_headlines(card))


# ---- the pairs that the model was trained on -------------------------------------------------------------------------


def _without_learned(
    config: RewardCardConfig, context: StageContext, records: list[PreferencePair], learned: list[PreferencePair]
) -> tuple[list[PreferencePair], Learned | None]:
    """The pairs to judge, and how many pairs overlap with the learned ones; None if those are unknown."""
    if not learned:
        return records, None
    part_known, others = _part_is_known(config, context), []
    if not part_known:  # all rows of the learned pairs' own source, instead of a fraction
        others = rows_of(context, PreferencePair, replace(config.learned, fraction=1.0, mix=[]), field=LEARNED)
    known = asked_too(records, [*learned, *others])
    others = [record for record in records if asked(record).text not in known]
    overlap = Learned(
        num_pairs=len(learned),
        judged_too=len(records) - len(others),
        left_out=config.leave_out_learned,
        part_known=part_known,
    )
    if not config.leave_out_learned:
        return records, overlap
    if not others:
        did = "was" if part_known else "may have been"
        raise DataError(
            f"all {len(records)} pairs have prompts that the reward model {did} trained on",
            where=f"stages.{context.spec.stage}.data",
            remedy="judge other pairs, or set leave_out_learned=false",
        )
    return others, overlap


def _part_is_known(config: RewardCardConfig, context: StageContext) -> bool:
    """Whether the pairs drawn here are those that the model learned from. A fraction is drawn with the run's seed among
    the rows that fit, so one row more or less changes the whole draw."""
    if config.learned.fraction == 1.0:
        return True
    path = context.spec.inputs["reward"].path
    made = None if path is None else read_manifest(path)
    if path is None or made is None:
        return False
    return made.identity.get("seed") == context.spec.seed and not (path / LEFT_OUT).exists()


# ---- the model and its rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """The model, the pairs within its limits, and their rows in its token ids: chosen, rejected, chosen, … ``too_long``
    counts the pairs that are not."""

    model: PreTrainedModel | PeftModel
    pairs: list[PreferencePair]
    rows: list[list[int]]
    too_long: int


def _read(config: RewardCardConfig, context: StageContext, records: list[PreferencePair]) -> _Reading:
    reward = context.spec.inputs["reward"]
    assert reward.path is not None, "the plan refuses 'base' in a reward slot"
    if read_manifest(reward.path) is None:
        return _read_text(config, context, records)
    tokenizer = load_tokenizer(context.spec.base_path, context.spec.model.template)
    refuse_other_tokenizer(context.spec, reward, tokenizer)
    limits = Limits(row=config.max_length, too_long=config.too_long)
    rows_of_pairs, _ = fitting(context, PAIRS, records, config.data, limits, tokenizer)
    parts = [row for pair_rows in rows_of_pairs.values() for row in pair_rows.rows]
    rows = [row[PROMPT] + row[answer] for row in parts for answer in ("chosen", "rejected")]
    model = load_reward_model(context.spec, reward, device=context.device).to(context.device)
    pairs = [records[index] for index in rows_of_pairs]
    return _Reading(model=model, pairs=pairs, rows=rows, too_long=len(records) - len(pairs))


def _read_text(config: RewardCardConfig, context: StageContext, records: list[PreferencePair]) -> _Reading:
    """A model that no stage made has its own tokenizer and chat template."""
    spec, limits = context.spec, Limits(row=config.max_length, too_long=config.too_long)
    reward = spec.inputs["reward"]
    assert reward.path is not None, "the plan refuses 'base' in a reward slot"
    if limits.cuts:
        raise ModelError(
            f"{reward.ref} reads text, so its rows cannot be cut",
            where=f"stages.{spec.stage}.too_long",
            remedy="set too_long.do=drop",
        )
    model, tokenizer = load_external(reward.path, spec.model.dtype, source=reward.ref)
    prompts = [Prompt(messages=record.messages, tools=record.tools, where=record.where) for record in records]
    computation = Computation(device=context.device, dtype=spec.model.dtype, tokens=config.micro_batch_tokens)
    scorer = TextScorer(model.to(context.device), tokenizer, prompts, computation, source=reward.ref)
    both = [
        [scorer.ids(prompt, text) for text in (record.chosen, record.rejected)]
        for prompt, record in zip(prompts, records, strict=True)
    ]
    longest = [max(map(len, rows)) for rows in both]
    fits = [length <= limits.row for length in longest]
    where = f"stages.{spec.stage}"
    refuse_losses(
        limits, dropped=fits.count(False), cut=0, records=len(records), longest=max(longest, default=0), where=where
    )
    return _Reading(
        model=model,
        pairs=[record for record, fit in zip(records, fits, strict=True) if fit],
        rows=[row for rows, fit in zip(both, fits, strict=True) if fit for row in rows],
        too_long=fits.count(False),
    )


# ---- scores and figures ----------------------------------------------------------------------------------------------


def _scores(config: RewardCardConfig, context: StageContext, reading: _Reading) -> list[float]:
    parts = grouped(reading.rows, AT_ONCE)

    def scores_of(share: Sequence[Sequence[list[int]]]) -> list[float]:
        scores: list[float] = []
        with products_in(context.spec.model.dtype, context.device):
            for number, part in enumerate(share):
                context.progress("scoring", number, len(share))
                tokens = config.micro_batch_tokens
                scores += flat_scores(reading.model, part, tokens=tokens, device=context.device).tolist()
        return scores

    scores = in_shares(context, parts, scores_of)
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            where = reading.pairs[index // 2].where
            raise RewardError(f"gave {score} for an answer to {where}", where=context.spec.inputs["reward"].ref)
    return scores


def _judged(
    config: RewardCardConfig, context: StageContext, reading: _Reading, scores: list[float], bag: BagOfWords | None
) -> list[Judged]:
    by_rule = None if config.rule is None else scores_by_rule(config.rule, context, reading.pairs)
    words = bag.margins([(pair.chosen, pair.rejected) for pair in reading.pairs]) if bag else None
    return [
        Judged(
            pair=pair,
            scores=(scores[2 * index], scores[2 * index + 1]),
            tokens=(len(reading.rows[2 * index]), len(reading.rows[2 * index + 1])),
            words=None if words is None else words[index],
            rule=None if by_rule is None else (by_rule[2 * index], by_rule[2 * index + 1]),
        )
        for index, pair in enumerate(reading.pairs)
    ]


def _invariances(config: RewardCardConfig, context: StageContext, reading: _Reading) -> Invariances:
    """How far scores of the first pairs change where they should not, in the model's number format and in float32.
    Afterwards the model is in float32."""
    own = context.spec.model.dtype
    formats = {}
    for dtype in dict.fromkeys((own, Dtype.float32)):
        context.progress(f"scoring again in {dtype.value}")
        if dtype is not own:
            reading.model.float()
        formats[dtype.value] = _moved(config, context, reading, dtype)
    exact = formats[Dtype.float32.value]
    num_pairs = min(config.invariance_pairs, len(reading.pairs))
    return Invariances(num_pairs=num_pairs, formats=formats, moved=beyond_rounding(exact))


def _moved(config: RewardCardConfig, context: StageContext, reading: _Reading, dtype: Dtype) -> Rescored:
    model, device = reading.model, context.device
    rows = reading.rows[: 2 * config.invariance_pairs]

    def score(rows: Rows) -> Any:
        return flat_scores(model, rows, tokens=config.micro_batch_tokens, device=device)

    def padded(rows: Rows, left: bool) -> Any:
        return padded_scores(model, rows, left=left, device=device)

    with products_in(dtype, device):
        # Only the flat forward supports a prefix.
        plain = padded if prefix_of(unwrapped(model).base_model) is None else None
        return moved(score, plain, rows, context.generator("order"))


def _headlines(card: RewardCard) -> dict[str, float]:
    metrics = {"pairs": float(card.num_pairs), "accuracy": card.accuracy.mean}
    metrics |= {f"accuracy/{judge.name.replace(' ', '_')}": judge.accuracy.mean for judge in card.baselines}
    scales = {"ece": card.calibration.ece, "brier": card.calibration.brier, "log_loss": card.calibration.log_loss}
    return metrics | {name: value for name, value in scales.items() if value is not None}
