"""Tries the tasks of a benchmark before a run trains anything (``StageKind.rehearse``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lm_eval.api.model import LM

from alignment.core.errors import NonFiniteError, StageError
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.benchmark.harness_run import run_arm
from alignment.stages.benchmark.harness_tasks import load
from alignment.stages.benchmark.kind import selected
from alignment.training.context import StageContext

NUM_ROWS = 100
"""How many rows of each task are tried: a function may need a package or a file for some rows only (chosen, not
tuned)."""


class _SameAnswer(LM):
    """Answers every request alike, without a model."""

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        return ["Yes." for _ in requests]


def try_tasks(config: BenchmarkConfig, context: StageContext) -> None:
    """Loads the tasks with their data and functions, and has their metrics score the first rows.

    Raises:
        DataError: a task cannot be loaded, or the right answer of a row is not one of its choices.
        StageError: a function of a task failed; the remedy names a package or a file that is missing.
    """
    where = f"stages.{context.spec.stage}.tasks"
    chosen = selected(config)
    limit = min(config.limit or NUM_ROWS, NUM_ROWS)
    brief = replace(config, limit=limit, apply_chat_template=False, bootstrap_samples=1)
    with TemporaryDirectory() as folder:
        loaded = load(chosen, config.tasks, Path(folder), context.spec.extra_data, where=where)
        try:
            run_arm(_SameAnswer(), loaded, chosen, brief, name="the trial", where=where)
        except NonFiniteError:
            pass  # of answers that no model gave
        except StageError as error:
            if not isinstance(error.__cause__, ArithmeticError):  # a share of no rows, say
                raise
