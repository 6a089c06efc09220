"""What defines a stage's result: the canonical form that is hashed into its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.config.run import RunConfig
from alignment.config.stage import EvaluateConfig
from alignment.fingerprint import canonical, file_sha256
from alignment.pipeline.sources import ModelSource, remembered_sha256

RULE = Path(__file__).parents[1] / "evaluation" / "house_style.py"
"""The gold rule and the style prompt: an evaluation under an older rule is not reused."""


def of_stage(
    run: RunConfig,
    name: str,
    *,
    base: ModelSource,
    data: Path | None,
    inputs: dict[str, str],
    arms: dict[str, str],
) -> dict[str, Any]:
    """``inputs`` and ``arms`` give the fingerprint of what each slot holds.

    The stage's name is part of it because random numbers are drawn by it. Paths, launch, tracking, and how often a
    stage logs or saves are not.
    """
    stage = run.stages[name]
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": stage.revision,
        "rule": file_sha256(RULE) if isinstance(stage, EvaluateConfig) else None,
        "config": canonical(stage),
        "data": None if data is None else remembered_sha256(data),
        "inputs": inputs,
        "arms": arms,
        "base": {"content": base.identity, "dtype": run.model.dtype.value},
        "seed": run.seed,
    }


def of_report(run: RunConfig, name: str, *, inputs: dict[str, str]) -> dict[str, Any]:
    """A report shows the whole run, so ``inputs`` holds every other stage's fingerprint."""
    stage = run.stages[name]
    return {
        "stage": name,
        "kind": stage.kind,
        "revision": stage.revision,
        "config": canonical(stage),
        "inputs": inputs,
        "run": {"name": run.name, "summary": run.summary},
    }
