"""How far a student is from its teacher, and how much faster the teacher answers with its help."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from alignment.algos.sampling import expected_speed_up, tokens_per_step
from alignment.config.model import Dtype
from alignment.config.optim import tokens_of
from alignment.core.errors import StageError
from alignment.data.tokens.tokenize import end_ids
from alignment.evaluation.arms import grouped
from alignment.evaluation.statistics import Intervals
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.forward.answers import answer_states, batches
from alignment.models.forward.divergence import divergence_from, teaching_at
from alignment.models.forward.flat import use_flat_attention
from alignment.records.interval import Interval
from alignment.records.stages import Assisted, StudentFigures, Timing
from alignment.stages.distil.kind import DistilConfig
from alignment.stages.distil.student import HeldOutAnswers
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
        some, tokens = slice(spans[number][0], spans[number][-1] + 1), tokens_of(config.optim.micro_batch_tokens)
        prompts, answers = held_out.prompts[some], held_out.answers[some]
        return sums_of_answers(held[0], teacher, prompts, answers, temperature=config.temperature, tokens=tokens)

    spans = grouped(range(len(held_out.answers)), config.batch_size)
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
    """For each answer the sums over its tokens of acceptance, agreement and divergence, and their number. ``tokens``
    limits those of a micro-batch."""
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


TIE = 1e-3
"""Logits that are this near to each other may change places by rounding in float32."""

Tokens = Sequence[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Greedy:
    """Greedy answers of at most ``max_new_tokens`` tokens, which end with one of ``end_ids``."""

    max_new_tokens: int
    end_ids: list[int]
    pad_id: int

    def answered(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Tokens],
        *,
        draft: PreTrainedModel | None = None,
        lengths: Sequence[int] | None = None,
    ) -> tuple[list[list[int]], float]:
        """Answers as token ids, one prompt after another, and the seconds that all of them took; ``lengths`` sets how
        many tokens each answer has, without regard to its end."""
        answers, seconds = [], 0.0
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first one again: it warms up
            exact = None if lengths is None else lengths[max(0, number - 1)]
            started = time.perf_counter()
            answer = self._answer(model, prompt, draft=draft, exact=exact)
            if number:
                seconds += time.perf_counter() - started
                answers.append(answer)
        return answers, seconds

    @torch.no_grad()
    def _answer(
        self, model: PreTrainedModel, prompt: Tokens, *, draft: PreTrainedModel | None, exact: int | None
    ) -> list[int]:
        ids = torch.tensor([list(prompt)], device=model.device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=exact or self.max_new_tokens,
            min_new_tokens=exact,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
        )
        assistant = {} if draft is None else {"assistant_model": draft}
        output: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, **assistant)
        answer: list[int] = output[0, ids.shape[1] :].tolist()
        return answer


def timing(
    config: DistilConfig,
    context: StageContext,
    tokenizer: Any,
    teacher: Lineage,
    prompts: Sequence[Tokens],
    students: Sequence[tuple[Lineage, StudentFigures]],
) -> Timing:
    """Times of the teacher alone, and with the student before and after it learned."""
    greedy = Greedy(
        max_new_tokens=config.max_new_tokens, end_ids=sorted(end_ids(tokenizer)), pad_id=tokenizer.pad_token_id
    )
    model = _as_loaded(context, teacher)
    alone, seconds = greedy.answered(model, prompts)
    lengths = [len(answer) for answer in alone]
    assisted: list[Assisted] = []
    cost_ratio = 0.0
    for student, figures in students:
        draft = _drafting(_as_loaded(context, student), config.gamma)
        if not assisted:
            cost_ratio = greedy.answered(draft, prompts, lengths=lengths)[1] / seconds
        answers, assisted_seconds = greedy.answered(model, prompts, draft=draft)
        gaps = gaps_at_differences(model, prompts, alone, answers)
        if context.spec.model.dtype is Dtype.float32 and max(gaps, default=0.0) > TIE:
            raise StageError(
                f"{len(gaps)} of {len(prompts)} greedy answers with a draft differ from those without it, where the "
                f"teacher's logits differ by up to {max(gaps):.3g}",
                where=f"stages.{context.spec.stage}.timed_prompts",
                remedy="report this with the versions of torch and transformers; timed_prompts=0 skips this",
            )
        assisted.append(
            Assisted(
                seconds=assisted_seconds,
                expected=_expected(figures.same_top, config.gamma, cost_ratio),
                expected_sampling=_expected(figures.acceptance, config.gamma, cost_ratio),
                differing=len(gaps),
                widest_gap=max(gaps, default=0.0),
            )
        )
        del draft  # else it would be in memory while the next one is loaded
    before, after = assisted
    return Timing(
        prompts=len(prompts),
        tokens=sum(lengths),
        seconds=seconds,
        cost_ratio=cost_ratio,
        before=before,
        after=after,
    )


def _expected(acceptance: Interval, gamma: int, cost_ratio: float) -> Interval:
    return acceptance.through(lambda rate: expected_speed_up(rate, gamma, cost_ratio))


def gaps_at_differences(
    model: PreTrainedModel, prompts: Sequence[Tokens], alone: Sequence[Tokens], assisted: Sequence[Tokens]
) -> list[float]:
    """How far apart the model's logits of the first two tokens are that differ, for each answer that differs. An answer
    that only ends earlier than the other is infinitely far apart."""
    gaps = []
    for prompt, own, other in zip(prompts, alone, assisted, strict=True):
        if list(own) == list(other):
            continue
        differing = [index for index, (a, b) in enumerate(zip(own, other, strict=False)) if a != b]
        if not differing:
            gaps.append(float("inf"))
            continue
        first = differing[0]
        ids = torch.tensor([[*prompt, *own[:first]]], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, -1].float()
        gaps.append(float((logits[own[first]] - logits[other[first]]).abs()))
    return gaps


def _as_loaded(context: StageContext, policy: Lineage) -> PreTrainedModel:
    model = load_policy(policy, DTYPES[context.spec.model.dtype]).to(context.device)
    model.generation_config = GenerationConfig()  # nothing of the model's own may change what is compared
    return model


def _drafting(model: PreTrainedModel, gamma: int) -> PreTrainedModel:
    """Drafts ``gamma`` tokens in every step, as the expected speed-up assumes; by default their number adapts."""
    model.generation_config.num_assistant_tokens = gamma
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model
