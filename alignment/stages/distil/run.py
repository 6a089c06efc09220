"""A student learns from a teacher's answers, and is compared with it before and after (docs/design/0036). The teacher
answers all prompts first. Then the student learns, by the forward divergence from the teacher at each token or from the
answers alone. What is reported is measured on the student as it was saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datasets import Dataset
from peft import TaskType
from transformers import PreTrainedModel

from alignment.core.errors import ConfigError
from alignment.data.records import Prompt
from alignment.models.assembly.load import Lineage, lineage
from alignment.models.assembly.prefix import prefix_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.causal import install_causal
from alignment.models.forward.divergence import install_divergence, refuse_other_heads
from alignment.records.stages import Distillation, StudentFigures, Timing
from alignment.stages.distil.kind import BEFORE, DistilConfig
from alignment.stages.distil.student import DistilTrainer, HeldOutAnswers, saved_student, student_of, taught_rows
from alignment.stages.distil.student_comparison import compared, frozen_model, timing
from alignment.stages.shared.answer_sampling import AskedPrompts, asked_prompts, sampled_answers
from alignment.stages.shared.language_model import MicroBatchedSftTrainer, next_token_trainer, uniform_loss
from alignment.stages.shared.policies import asked_tokenizer
from alignment.stages.shared.result import StageResult, initial_model, save_model
from alignment.stages.shared.stage_rows import rows_of
from alignment.training.context import StageContext
from alignment.training.session import train
from alignment.training.sharding import load_whole_again, prepare, shared


def run(config: DistilConfig, context: StageContext) -> StageResult:
    """A teacher, a student and prompts in; a policy and ``distillation.json`` out. Raises ConfigError: the student
    would have as many layers as its teacher. Raises DataError: no prompt is left to ask, or too few to hold any out.
    Raises ModelError: teacher and student do not fit each other. Raises StageError: the training diverged, or greedy
    answers with the draft are not the teacher's."""
    context.progress("loading")
    tokenizer = asked_tokenizer(context, field="teacher")
    start = student_of(config, context, tokenizer)
    taught_by = lineage(context.spec, context.spec.inputs["teacher"])
    teacher = _teacher(config, context, start, taught_by)
    asked = asked_prompts(config, context, tokenizer, rows_of(context, Prompt, config.data))
    answers = sampled_answers(config, context, taught_by, tokenizer, asked)
    rows, held_out = taught_rows(config, context, asked, answers)
    before = _figures(config, context, start, teacher, held_out, when="before")
    loss, result = _learned(config, context, start, teacher, tokenizer, rows)
    student = saved_student(context, start, result)
    after = _figures(config, context, student, teacher, held_out, when="after")
    metrics = {"loss": loss, **_counts(asked, answers, rows), **_metrics(before, after, held_out)}
    if before is not None and after is not None:
        del teacher  # its time is measured on a copy that is loaded as any user loads it
        times = _timing(config, context, tokenizer, taught_by, held_out, ((start, before), (student, after)))
        if context.is_main:
            Distillation(
                method=config.method.value,
                layers=config.layers,
                temperature=config.temperature,
                gamma=config.gamma,
                prompts=len(held_out.distinct),
                tokens=sum(map(len, held_out.answers)),
                before=before,
                after=after,
                timing=times,
            ).write(context.content)
    return replace(result, metrics=metrics)


def _teacher(config: DistilConfig, context: StageContext, start: Lineage, taught_by: Lineage) -> PreTrainedModel:
    where = f"stages.{context.spec.stage}"
    teacher = frozen_model(context, taught_by)
    refuse_other_heads(frozen_model(context, start), teacher, where=f"{where}.init")
    if config.timed_prompts and prefix_of(teacher.base_model) is not None:
        raise ConfigError(
            f"{config.timed_prompts}, but assisted generation is not timed with a teacher that has a prefix; use 0",
            where=f"{where}.timed_prompts",
        )
    return teacher


def _figures(
    config: DistilConfig,
    context: StageContext,
    student: Lineage,
    teacher: PreTrainedModel,
    held_out: HeldOutAnswers,
    *,
    when: str,
) -> StudentFigures | None:
    if not held_out.answers or context.search is not None:
        return None
    return compared(config, context, student, teacher, held_out, when=when)


def _learned(
    config: DistilConfig, context: StageContext, start: Lineage, teacher: PreTrainedModel, tokenizer: Any, rows: Dataset
) -> tuple[float, StageResult]:
    policy = initial_model(context, start, TaskType.CAUSAL_LM, may_drop=False)
    if config.method.needs_teacher:
        trainer: MicroBatchedSftTrainer = distil_trainer(config, context, policy, teacher, tokenizer, rows)
    else:
        trainer = next_token_trainer(MicroBatchedSftTrainer, config, context, policy, tokenizer, rows, max_length=None)
        install_causal(unwrapped(policy))
    prepare(policy, context)
    ceiling = uniform_loss(policy)
    last = train(trainer, context, headline="loss", ceiling=ceiling)
    result = save_model(trainer.model, tokenizer, context, start, {})
    load_whole_again()  # the student that was saved is compared with its teacher next
    return last["loss"], result


def distil_trainer(
    config: DistilConfig, context: StageContext, policy: Any, teacher: PreTrainedModel, tokenizer: Any, rows: Dataset
) -> DistilTrainer:
    """The trainer that minimises the student's divergence from the teacher; the caller calls ``prepare``."""
    trainer = next_token_trainer(DistilTrainer, config, context, policy, tokenizer, rows, max_length=None)
    trainer.teacher, trainer.temperature = teacher, config.loss_temperature
    install_divergence(unwrapped(policy))
    return trainer


def _counts(asked: AskedPrompts, answers: Any, rows: Dataset) -> dict[str, float]:
    return {
        "rows": float(len(rows)),
        "rows_too_long": float(asked.too_long),
        "prompts": float(len(asked.rows)),
        "prompts_evaluated": float(asked.evaluated),
        "prompts_repeated": float(asked.repeated),
        "answer_tokens": float(sum(len(answer) for of_prompt in answers for answer in of_prompt)),
    }


def _metrics(before: StudentFigures | None, after: StudentFigures | None, held_out: HeldOutAnswers) -> dict[str, float]:
    """What the manifest says of the comparison; times are left out, because they are never the same."""
    if before is None or after is None:
        return {}
    figures = {}
    for ending, student in ((BEFORE, before), ("", after)):
        figures[f"eval_acceptance{ending}"] = student.acceptance.mean
        figures[f"eval_same_top{ending}"] = student.same_top.mean
        figures[f"eval_divergence{ending}"] = student.divergence.mean
    return figures | {
        "eval_tokens_per_step": after.tokens_per_step.mean,
        "eval_prompts": float(len(held_out.distinct)),
        "eval_tokens": float(sum(map(len, held_out.answers))),
    }


def _timing(
    config: DistilConfig,
    context: StageContext,
    tokenizer: Any,
    teacher: Lineage,
    held_out: HeldOutAnswers,
    students: Any,
) -> Timing | None:
    if not config.timed_prompts:
        return None
    context.progress("timing assisted generation")
    prompts = held_out.distinct[: config.timed_prompts]
    times = shared(lambda: timing(config, context, tokenizer, teacher, prompts, students) if context.is_main else None)
    return times[0]
