"""A cache of each arm's answers, next to the artifacts. Greedy or from a seed, they would come out the same again.

A second evaluation, or the next trial of a sweep, computes only new arms. The file name depends on everything that
could change an answer: weights, prompts, number format and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignment.config.launch import Engine
from alignment.evaluation.arms import TokenSum
from alignment.models.assembly.load import Lineage, weights_sha256
from alignment.stages.evaluate import cache_file
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.prompts import TurnPrompts
from alignment.training.context import StageContext

VERSION = 3
"""Raised when the computation changes, so that older files are not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedAnswers:
    """Answers as token ids; the rest as in ``Answered`` (alignment/evaluation/arms.py)."""

    ids: list[list[int]]
    logprobs: list[float] | None
    references: list[TokenSum | None]
    seconds: float


def file_of(
    config: EvaluateConfig,
    context: StageContext,
    policy: Lineage,
    asked: TurnPrompts,
    *,
    ends: Sequence[int],
    with_logprobs: bool,
) -> Path:
    """The file that caches, or will cache, a policy's answers in one turn."""
    answers, engine = config.answers, config.sampling.engine
    parts = [
        VERSION,
        *cache_file.versions(context),
        weights_sha256(policy),
        config.max_new_tokens,
        list(ends),
        with_logprobs,
        list(asked.prompts),
        [None if reference is None else reference.key for reference in asked.references],
    ]
    if answers.temperature > 0.0:
        parts += [answers.per_prompt, answers.temperature, context.seed(*seed_of(asked))]
        parts += [asked.rows] if asked.number else []  # random numbers are drawn by row; a first turn has all rows
    if engine is not Engine.own:
        parts += [engine.value]
    return cache_file.path_of(context.spec.artifact, "answers", parts)


def seed_of(asked: TurnPrompts) -> tuple[Any, ...]:
    """The name that the random numbers of a turn are derived from."""
    return ("answers", asked.number) if asked.number else ("answers",)


def read(file: Path) -> CachedAnswers | None:
    """The cached answers, or None if the file is missing or damaged."""
    fields = cache_file.read(file)
    if fields is None:
        return None
    references = [None if total is None else TokenSum(**total) for total in fields.pop("references")]
    return CachedAnswers(references=references, **fields)


def write(file: Path, answers: CachedAnswers) -> None:
    """Writes the file."""
    cache_file.write(file, asdict(answers))
