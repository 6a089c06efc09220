"""Measures which abilities of the base model policies lost: perplexity of general text, multiple-choice questions."""

from __future__ import annotations

from alignment.core.artifacts import write_lines
from alignment.data.records import PlainText, Question
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation import forgetting_measures as measures
from alignment.evaluation.statistics import Intervals
from alignment.job import StageInput
from alignment.models.assembly.load import lineage, refuse_other_tokenizer
from alignment.records.stages import Limits
from alignment.stages.forgetting.kind import ForgettingConfig
from alignment.stages.shared.policies import Policies
from alignment.stages.shared.policy_logprobs import PolicyRows, on_main, policy_logprobs
from alignment.stages.shared.result import StageResult
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext

TEXTS, QUESTIONS = "texts", "questions"


def run(config: ForgettingConfig, context: StageContext) -> StageResult:
    """Policies in, ``forgetting.json``, ``texts.jsonl`` and ``questions.jsonl`` out. The processes share what the
    policies read. The stage does not fail if an arm exceeds a limit; the driver fails the run at its end."""
    spec = context.spec
    context.progress("loading")
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    for arm in spec.arms.values():
        refuse_other_tokenizer(spec, arm, tokenizer)
    texts = rows_of(context, PlainText, config.data)
    questions = rows_of(context, Question, config.questions, field=QUESTIONS)
    material = measures.material(tokenizer, texts, questions)
    arms = {measures.BASE: StageInput(ref=measures.BASE, path=None), **{name: spec.arms[name] for name in config.arms}}
    by_arm = _measured(context, arms, material)
    return on_main(context, lambda: _written(config, context, by_arm, material)) or StageResult(metrics={})


def _measured(
    context: StageContext, arms: dict[str, StageInput], material: measures.Material
) -> dict[str, measures.Measured]:
    asked = {}
    for name, arm in arms.items():
        for kind, (prompts, answers) in ((TEXTS, material.chunk_rows), (QUESTIONS, material.choice_rows)):
            asked[name, kind] = PolicyRows(policy=lineage(context.spec, arm), prompts=prompts, answers=answers)
    logprobs = policy_logprobs(context, "measuring", Policies(context), asked)
    return {
        name: measures.measured(material, logprobs[name, TEXTS], logprobs[name, QUESTIONS], name=name) for name in arms
    }


def _written(
    config: ForgettingConfig, context: StageContext, by_arm: dict[str, measures.Measured], material: measures.Material
) -> StageResult:
    limits = Limits(perplexity_rise=config.max_perplexity_rise, ability_drop=config.max_ability_drop)
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    record = measures.table(by_arm, material, limits=limits, intervals=intervals)
    record.write(context.content)
    write_lines(context.content / "texts.jsonl", measures.text_rows(by_arm, material))
    write_lines(context.content / "questions.jsonl", measures.question_rows(by_arm, material))
    return StageResult(metrics=measures.headlines(record))
