"""What a plan knows of stages with ``optim.micro_batch_tokens=auto``."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.stage import is_automatic
from alignment.job import memory_key
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.records import training


def lines(plan: Plan, stage: PlannedStage) -> Iterator[str]:
    """What the stage will do about its size, as the end of a sentence that begins with its name; empty for others."""
    if not is_automatic(stage.config):
        return
    key = memory_key(stage.config, stage.identity, stage.inputs)
    sizes = training.remembered(training.cache_file(plan.output / "artifacts", key), key)
    chosen = [f"{size.tokens:,} tokens on {size.machine} ({size.launch})" for size in sizes]
    yield f"will choose optim.micro_batch_tokens before its first step{': so far ' * bool(chosen)}{'; '.join(chosen)}"
