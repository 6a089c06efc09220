"""Measures which abilities of the base model policies lost: perplexity of general text, multiple-choice questions."""

from __future__ import annotations

from alignment.core.artifacts import write_lines
from alignment.data.records import PlainText, Question
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.forgetting_measures import BASE, Asked, headlines, question_rows, table, text_rows
from alignment.evaluation.general import Material, Measured, material, measure
from alignment.job import StageInput
from alignment.models.assembly.load import DTYPES, lineage, load_policy, refuse_other_tokenizer
from alignment.models.forward.flat import use_flat_attention
from alignment.records.forgetting import Limits
from alignment.stages.forgetting.config import ForgettingConfig
from alignment.stages.shared.result import StageResult
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext


def run(config: ForgettingConfig, context: StageContext) -> StageResult:
    """Policies in, ``forgetting.json``, ``texts.jsonl`` and ``questions.jsonl`` out, on one process.

    The stage does not fail if an arm exceeds a limit; the driver fails the run at its end.
    """
    spec = context.spec
    context.progress("loading")
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    for arm in spec.arms.values():
        refuse_other_tokenizer(spec, arm, tokenizer)
    texts = rows_of(context, PlainText, config.data)
    questions = rows_of(context, Question, config.questions, field="questions")
    tokens = material(tokenizer, texts, questions)
    arms = {BASE: StageInput(ref=BASE, path=None), **{name: spec.arms[name] for name in config.arms}}
    measured: dict[str, Measured] = {}
    for name, arm in arms.items():
        context.progress("measuring", len(measured), len(arms))
        measured[name] = _measure(name, arm, tokens, context)
    asked = Asked(texts=texts, tokens=tokens.tokens, questions=questions)
    limits = Limits(perplexity_rise=config.max_perplexity_rise, ability_drop=config.max_ability_drop)
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    record = table(measured, asked, limits=limits, intervals=intervals)
    record.write(context.content)
    write_lines(context.content / "texts.jsonl", text_rows(measured, asked))
    write_lines(context.content / "questions.jsonl", question_rows(measured, asked))
    return StageResult(metrics=headlines(record))


def _measure(name: str, arm: StageInput, tokens: Material, context: StageContext) -> Measured:
    model = load_policy(lineage(context.spec, arm), DTYPES[context.spec.model.dtype]).to(context.device)
    use_flat_attention(model)
    return measure(model, tokens, name=name)
