"""Warns of stages that do not train the embedding rows of added tokens."""

from __future__ import annotations

import json

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import NEW_TOKENS
from alignment.pipeline.plan.plan import Plan
from alignment.pipeline.plan.references import BASE
from alignment.stages.registry import as_trained


def frozen_rows(plan: Plan) -> str | None:
    """A warning if a stage starts from a base with added tokens and does not train their rows; otherwise None."""
    file = None if plan.base.folder is None else plan.base.folder / NEW_TOKENS
    if file is None or not file.is_file():
        return None
    tokens = ", ".join(json.loads(file.read_text(encoding="utf-8")))
    for stage in plan.stages:
        config = as_trained(stage.config)
        if config is None or config.init != BASE or not stage.has_to_run:
            continue
        if not _trains_rows(config.adapter):
            return (
                f"{stage.name} does not train the rows of the new tokens {tokens}: these stay the mean of all other "
                f"rows; set stages.{stage.name}.adapter.modules_to_save=[embed_tokens] (or this model's name for it), "
                "or adapter=full"
            )
    return None


def _trains_rows(adapter: AdapterConfig) -> bool:
    """Whether the embeddings are trained: with all weights, or as a module beside the adapter."""
    names = adapter.modules_to_save
    return adapter.kind is AdapterKind.full or any("embed" in name or name.endswith("wte") for name in names)
