"""Compares a student with its teacher on the teacher's answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from alignment.algos.sampling import tokens_per_step
from alignment.config.stage import tokens_of
from alignment.evaluation.statistics import Intervals
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.forward.answers import answer_states, batches
from alignment.models.forward.distilled import teaching_at
from alignment.models.forward.divergence import divergence_from
from alignment.models.forward.flat import use_flat_attention
from alignment.records.interval import Interval
from alignment.records.stages import StudentFigures
from alignment.stages.distil.config import DistilConfig
from alignment.stages.distil.taught_rows import HeldOutAnswers
from alignment.stages.shared.answer_sampling import made_in_parts
from alignment.training.context import StageContext


def frozen_model(context: StageContext, policy: Lineage) -> PreTrainedModel:
    """A policy as it is used, in evaluation mode, with the fast forward, whole on this process's device."""
    model = load_policy(policy, DTYPES[context.spec.model.dtype]).to(context.device).requires_grad_(False)
    use_flat_attention(model)
    return model


def compared(
    config: DistilConfig,
    context: StageContext,
    student: Lineage,
    teacher: PreTrainedModel,
    held_out: HeldOutAnswers,
    *,
    when: str,
) -> StudentFigures:
    """The figures of a student on the held-out answers; ``when`` names them among the stored parts."""
    held: list[PreTrainedModel] = []

    def sums(number: int) -> list[list[float]]:
        if not held:
            held.append(frozen_model(context, student))
        span = spans[number]
        return sums_of_answers(
            held[0],
            teacher,
            held_out.prompts[span.start : span.stop],
            held_out.answers[span.start : span.stop],
            temperature=config.temperature,
            tokens=tokens_of(config.optim.micro_batch_tokens),
        )

    spans = _spans(len(held_out.answers), config.batch_size)
    phase = f"comparing-{when}"
    parts = made_in_parts(
        context,
        phase,
        [[held_out.answers[row] for row in span] for span in spans],
        sums,
        progress=lambda done: context.progress(phase, done, len(spans)),
    )
    intervals = Intervals(samples=config.bootstrap_samples, seed=context.seed("bootstrap"))
    return figures_of([row for part in parts for row in part], held_out.groups, intervals, gamma=config.gamma)


def _spans(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


@torch.no_grad()
def sums_of_answers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    temperature: float,
    tokens: int,
) -> list[list[float]]:
    """For each answer the sums over its tokens of acceptance, agreement and divergence, and their number.

    ``tokens`` limits those of a micro-batch.
    """
    rows: list[list[float]] = []
    for batch in batches(prompts, answers, tokens=tokens, device=student.device):
        teaching = teaching_at(teacher, batch.rows, batch.indices)
        divergence = divergence_from(student, answer_states(student, batch), teaching, temperature=temperature)
        columns = torch.stack(
            [
                divergence.acceptance.double(),
                divergence.is_same_top.double(),
                divergence.forward_kl.double(),
                torch.ones_like(divergence.acceptance, dtype=torch.float64),
            ]
        )
        rows += [of_answer.sum(-1).tolist() for of_answer in columns.split(list(batch.lengths), dim=-1)]
    return rows


def figures_of(
    sums: Sequence[Sequence[float]], groups: Sequence[int], intervals: Intervals, *, gamma: int
) -> StudentFigures:
    """Means over all tokens, with intervals for which whole prompts are drawn; ``groups`` numbers their prompts."""
    table = np.asarray(sums, dtype=np.float64)
    accepted, same, divergence, tokens = (np.bincount(np.asarray(groups), column) for column in table.T)

    def mean(values: np.ndarray) -> Interval:
        return intervals.of_ratio(values.tolist(), tokens.tolist())

    acceptance = mean(accepted)
    return StudentFigures(
        acceptance=acceptance,
        same_top=mean(same),
        divergence=mean(divergence),
        tokens_per_step=acceptance.through(lambda alpha: tokens_per_step(alpha, gamma)),
    )
