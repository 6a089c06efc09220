"""A cache of what models say of the arms' answers: log-probabilities under the reference, and rewards.

Neither a judge nor new votes change these figures, so an evaluation of the same answers need not load a model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.core.fingerprint import file_sha256
from alignment.costs.recorder import on_shadows
from alignment.models.assembly.load import Lineage, weights_sha256
from alignment.stages.evaluate import cache_file
from alignment.stages.shared.policy_logprobs import from_main
from alignment.training.context import StageContext

VERSION = 1
"""Raised when the computation changes, so that older files are not used."""


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
    """The cached scores of all answers, or those that ``compute`` gives, on every process; all must call this.

    ``computation`` is its name; ``head`` is a file of weights that the model has besides its lineage. Scores that
    are not finite are not cached, because they end the evaluation.
    """
    if on_shadows():
        return compute()

    def stored() -> tuple[Path, list[float] | None]:
        parts = [
            VERSION,
            *cache_file.versions(context),
            computation,
            weights_sha256(model),
            None if head is None else file_sha256(head),
            list(prompts),
            list(answers),
        ]
        file = cache_file.path_of(context.spec.artifact, "scores", parts)
        return file, cache_file.read(file)

    file, scores = from_main(context, stored)
    if scores is None:
        scores = compute()
        if context.is_main and all(map(math.isfinite, scores)):
            cache_file.write(file, scores)
    return scores
