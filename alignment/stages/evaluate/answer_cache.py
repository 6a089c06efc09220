"""What an arm answered, kept by content beside the artifacts: answers are greedy, so they come out the same again.

A second evaluation, or the next trial of a sweep, computes only the arms that are new. Anything that could change an
answer, weights, prompts, number format, changes the name of the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from alignment.core.files import remove_leftovers, write_text
from alignment.evaluation.arms import TokenSum
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.weights_hash import weights_sha256
from alignment.training.context import StageContext

log = logging.getLogger(__name__)

VERSION = 3
"""Raised when the computation changes, so that older files are not found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedAnswers:
    """Answers as token ids, an entry a prompt; the rest as in ``Answered`` (alignment/evaluation/arms.py)."""

    ids: list[list[int]]
    logprobs: list[float] | None
    references: list[TokenSum | None]
    seconds: float


def file_of(
    context: StageContext,
    policy: Lineage,
    prompts: Sequence[list[int]],
    references: Sequence[list[int] | None],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    with_logprobs: bool,
) -> Path:
    """Where the answers of a policy to these prompts are kept, or will be."""
    parts = [
        VERSION,
        torch.__version__,
        transformers.__version__,
        context.device.type,
        context.spec.model.dtype.value,
        weights_sha256(policy),
        max_new_tokens,
        list(ends),
        with_logprobs,
        list(prompts),
        list(references),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return context.spec.artifact.parent / "cache" / f"answers-{key}.json"


def read(file: Path, *, prompts: int) -> CachedAnswers | None:
    """What is kept there, or None where nothing is, or what is there is damaged."""
    try:
        sha, _, content = file.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() != sha:
            raise ValueError("its content differs from its hash")
        fields: dict[str, Any] = json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used and is made anew: %s", file, error)
        return None
    assert len(fields["ids"]) == prompts, "the name of the file stands for its prompts"
    references = [None if total is None else TokenSum(**total) for total in fields.pop("references")]
    return CachedAnswers(references=references, **fields)


def write(file: Path, answers: CachedAnswers) -> None:
    """By one rename, so that a file cut short is never found; on several machines that share the folder at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(answers))
    remove_leftovers(file.parent, shared=True)
    write_text(file, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
