"""``align add-tokens``: a model with more tokens as a folder to start a run from, made in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console

from alignment import launcher
from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import NEW_TOKENS
from alignment.config.stage import Trained
from alignment.pipeline import sources
from alignment.pipeline.display import display_for
from alignment.pipeline.export import new_folder
from alignment.pipeline.plan import Action, Plan
from alignment.pipeline.references import BASE

ADVICE = """start from it by model.source=path:{}; an adapter learns the new rows only with
stages.NAME.adapter.modules_to_save=[embed_tokens] (and lm_head, where that has weights of its own)"""


def add_tokens(console: Console, source: str, tokens: Sequence[str], *, to: str) -> int:
    """Writes the folder ``to``; returns the exit code. ``source`` is what ``model.source`` takes.

    Raises:
        ConfigError: ``to`` is taken.
        ModelError: there is no such model.
    """
    target = new_folder(to)
    model = sources.resolve(source, where="MODEL")
    if not model.ready:
        model = sources.fetch(model, announce=display_for(console).note)
    argv = [sys.executable, "-m", "alignment.new_tokens", str(model.folder), "--to", str(target), "--", *tokens]
    environment = launcher.environment(launcher.count_cores(), os.environ.get("PYTHONPATH", ""))
    code = subprocess.run(argv, env={**os.environ, **environment}, check=False).returncode
    if code == 0:
        console.print(f"written: {target}\n{ADVICE.format(target)}", markup=False, highlight=False, soft_wrap=True)
    return code


def frozen_rows(plan: Plan) -> str | None:
    """What is to be said where a stage begins with tokens that were added, and leaves their rows as they are."""
    file = None if plan.base.folder is None else plan.base.folder / NEW_TOKENS
    if file is None or not file.is_file():
        return None
    tokens = ", ".join(json.loads(file.read_text(encoding="utf-8")))
    for stage in plan.stages:
        config = stage.config
        if not isinstance(config, Trained) or config.init != BASE or stage.action is Action.reuse:
            continue
        if not _trains_rows(config.adapter):
            return (
                f"{stage.name} does not train the rows of the new tokens {tokens}: they stay the mean of all others; "
                f"set stages.{stage.name}.adapter.modules_to_save=[embed_tokens] (its name there), or adapter=full"
            )
    return None


def _trains_rows(adapter: AdapterConfig) -> bool:
    """Whether the embeddings learn: as a whole, or as one of the modules that an adapter names."""
    named = [*adapter.modules_to_save, *adapter.target_modules]
    return adapter.kind is AdapterKind.full or any("embed" in name or name.endswith("wte") for name in named)
