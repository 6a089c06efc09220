"""A cache next to the artifacts: each arm's answers, and what models say of them, as JSON behind its hash.

Greedy or from a seed, they would come out the same again. A second evaluation, or the next trial of a sweep, computes
only what is new. A file's name depends on everything that could change its value: weights, prompts, number format and
so on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from alignment.config.launch import Engine
from alignment.core.files import parse_json, remove_leftovers, write_text
from alignment.core.fingerprint import file_sha256
from alignment.costs.recorder import on_shadows
from alignment.evaluation.arms import TokenSum
from alignment.models.assembly.load import Lineage, weights_sha256
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.evaluate.prompts import TurnPrompts
from alignment.stages.shared.policy_logprobs import from_main
from alignment.training.context import StageContext

log = logging.getLogger(__name__)

ANSWERS_VERSION, SCORES_VERSION = 3, 1
"""Raised when a computation changes, so that older files are not used."""


def _file(context: StageContext, kind: str, version: int, parts: Sequence[Any]) -> Path:
    """The file for a value that depends on ``parts``, the libraries, the kind of device and the number format."""
    machine = [torch.__version__, transformers.__version__, context.device.type, context.spec.model.dtype.value]
    key = hashlib.sha256(json.dumps([version, *machine, *parts]).encode()).hexdigest()[:32]
    return context.spec.artifact.parent / "cache" / f"{kind}-{key}.json"


def _read(file: Path) -> Any:
    """The cached value, or None if the file is missing or damaged."""
    try:
        sha, _, content = file.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() != sha:
            raise ValueError("its content differs from its hash")
        return parse_json(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used and will be made again: %s", file, error)
        return None


def _write(file: Path, value: Any) -> None:
    """Writes with one rename, so that no machine that shares the folder ever sees an incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(value)
    remove_leftovers(file.parent, shared=True)
    write_text(file, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedAnswers:
    """Answers as token ids; the rest as in ``Answered`` (alignment/evaluation/arms.py)."""

    ids: list[list[int]]
    logprobs: list[float] | None
    references: list[TokenSum | None]
    seconds: float


def answers_file(
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
    references = [None if reference is None else reference.key for reference in asked.references]
    parts = [weights_sha256(policy), config.max_new_tokens, list(ends), with_logprobs, list(asked.prompts), references]
    if answers.temperature > 0.0:
        parts += [answers.per_prompt, answers.temperature, context.seed(*seed_of(asked))]
        parts += [asked.rows] if asked.number else []  # random numbers are drawn by row; a first turn has all rows
    if engine is not Engine.own:
        parts += [engine.value]
    return _file(context, "answers", ANSWERS_VERSION, parts)


def seed_of(asked: TurnPrompts) -> tuple[Any, ...]:
    """The name that the random numbers of a turn are derived from."""
    return ("answers", asked.number) if asked.number else ("answers",)


def read_answers(file: Path) -> CachedAnswers | None:
    """The cached answers, or None if the file is missing or damaged."""
    fields = _read(file)
    if fields is None:
        return None
    references = [None if total is None else TokenSum(**total) for total in fields.pop("references")]
    return CachedAnswers(references=references, **fields)


def write_answers(file: Path, answers: CachedAnswers) -> None:
    _write(file, asdict(answers))


def cached_scores(
    context: StageContext,
    computation: str,
    model: Lineage,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    compute: Callable[[], list[float]],
    *,
    head: Path | None = None,
) -> list[float]:
    """The cached scores of all answers, or those that ``compute`` gives, on every process; all must call this. Neither
    a judge nor new votes change them. ``computation`` is its name; ``head`` is a file of weights that the model has
    besides its lineage. Scores that are not finite are not cached, because they end the evaluation."""
    if on_shadows():
        return compute()

    def stored() -> tuple[Path, list[float] | None]:
        head_sha256 = None if head is None else file_sha256(head)
        parts = [computation, weights_sha256(model), head_sha256, list(prompts), list(answers)]
        file = _file(context, "scores", SCORES_VERSION, parts)
        return file, _read(file)

    file, scores = from_main(context, stored)
    if scores is None:
        scores = compute()
        if context.is_main and all(map(math.isfinite, scores)):
            _write(file, scores)
    return scores
