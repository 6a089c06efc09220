"""Distillation and speculative decoding in float64, number by number, from the papers. Word-level distillation is
Hinton et al. 2015, section 2, on a teacher's own answers (Kim and Rush 2016, section 3). Acceptance and speed-up are
Leviathan et al. 2023, theorem 3.5, equation 1 and theorem 3.8."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.oracles.logprobs import log_softmax


def forward_kl(teacher: Sequence[float], student: Sequence[float], temperature: float) -> float:
    """Σ p (log p − log q) of two rows of logits."""
    log_p = log_softmax([logit / temperature for logit in teacher])
    log_q = log_softmax([logit / temperature for logit in student])
    total = 0.0
    for of_teacher, of_student in zip(log_p, log_q, strict=True):
        total += math.exp(of_teacher) * (of_teacher - of_student)
    return total


def slopes(teacher: Sequence[float], student: Sequence[float], temperature: float) -> list[float]:
    """∂ forward_kl / ∂ student's logits: (q − p) / temperature."""
    log_p = log_softmax([logit / temperature for logit in teacher])
    log_q = log_softmax([logit / temperature for logit in student])
    return [(math.exp(q) - math.exp(p)) / temperature for p, q in zip(log_p, log_q, strict=True)]


def acceptance(teacher: Sequence[float], student: Sequence[float], temperature: float) -> float:
    """The probability that a token drawn from q is accepted: Σ q · min(1, p / q)."""
    log_p = log_softmax([logit / temperature for logit in teacher])
    log_q = log_softmax([logit / temperature for logit in student])
    total = 0.0
    for of_teacher, of_student in zip(log_p, log_q, strict=True):
        total += math.exp(of_student) * min(1.0, math.exp(of_teacher - of_student))
    return total


def mean_over_answers(values: Sequence[Sequence[float]], learned: Sequence[Sequence[bool]]) -> float:
    """The mean over all learned tokens of all rows, so that each token counts alike."""
    total, count = 0.0, 0
    for row, mask in zip(values, learned, strict=True):
        for value, counts in zip(row, mask, strict=True):
            if counts:
                total += value
                count += 1
    return total / count


def tokens_per_step(alpha: float, gamma: int) -> float:
    """The expected number of tokens of a step: Σ over lengths of length × its probability. The first i tokens are
    accepted with probability α^i, each token independently; one more comes from the target."""
    expected = 0.0
    for accepted in range(gamma):
        expected += (accepted + 1) * alpha**accepted * (1.0 - alpha)
    return expected + (gamma + 1) * alpha**gamma


def speed_up(alpha: float, gamma: int, cost_ratio: float) -> float:
    """Tokens of a step, over its time in passes of the target: γ passes of the draft and one of the target."""
    return tokens_per_step(alpha, gamma) / (gamma * cost_ratio + 1.0)
