"""The student of a stage: the policy that ``init`` names, or a model of its first layers, which is made here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from alignment.config.faults import refuse
from alignment.core.artifacts import Manifest
from alignment.core.errors import ModelError
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.models.assembly.first_layers import keep_first_layers
from alignment.models.assembly.load import Lineage, load_policy, saved_adapters, weights_dtype
from alignment.stages.distil.config import DistilConfig
from alignment.stages.distil.kind import too_many_layers
from alignment.stages.shared.result import StageResult, initial_policy
from alignment.training.context import StageContext
from alignment.training.sharding import everyones, shared


def student_of(config: DistilConfig, context: StageContext, tokenizer: Any) -> Lineage:
    """The student before it learns; ``tokenizer`` is the teacher's.

    Raises:
        ConfigError: ``init`` does not have more than ``layers`` layers.
        ModelError: the student has a different tokenizer or chat template than its teacher.
    """
    start, own = initial_policy(context)
    where = f"stages.{context.spec.stage}"
    if tokenizer_hashes(own) != tokenizer_hashes(tokenizer):
        raise ModelError(
            f"{config.init} has a different tokenizer or chat template than the teacher {config.teacher}",
            where=f"{where}.init",
            remedy="use a student of the teacher's family; model.chat_template gives both the same template",
        )
    if config.layers is None:
        return start
    available = AutoConfig.from_pretrained(str(start.base)).get_text_config().num_hidden_layers
    refuse(list(too_many_layers(config, available, where)))
    shared(lambda: _make(config.layers, context, start, tokenizer) if context.is_main else None)
    return Lineage(source="self", base=_folder(context), adapters=())


def _folder(context: StageContext) -> Path:
    return context.spec.work / "student"


def _make(layers: int | None, context: StageContext, start: Lineage, tokenizer: Any) -> None:
    """Writes a model folder of the first layers, unless an earlier attempt has."""
    assert layers is not None
    folder = _folder(context)
    if folder.is_dir():
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = load_policy(start, weights_dtype(context.spec.model.dtype, context.adapter))
    keep_first_layers(model, layers)
    model.config.use_cache = True  # it is off during training, but generation needs it
    model.save_pretrained(str(unfinished))
    tokenizer.save_pretrained(str(unfinished))
    os.replace(unfinished, folder)


def saved_student(context: StageContext, start: Lineage, result: StageResult) -> Lineage:
    """The student that ``save_model`` has just saved, on every process."""
    lineage = None
    if context.is_main:
        saved = Manifest(
            stage=context.spec.stage,
            kind=context.spec.produces,
            fingerprint=context.spec.fingerprint,
            identity={},
            adapters=result.adapters,
            adapters_stood=result.adapters_stood,
        )
        own = result.base["source"] == "self"
        base = context.content / "model" if own else start.base
        lineage = Lineage(source=start.source, base=base, adapters=saved_adapters(context.content, saved))
    everywhere: Lineage = everyones(lineage)[0]  # type: ignore[assignment]
    return everywhere
