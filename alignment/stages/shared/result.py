"""Where a training stage starts, and what it publishes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel, TaskType
from torch import Tensor
from transformers import PreTrainedModel

from alignment.core.artifacts import TOKENIZER
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.costs.recorder import on_shadows, recorder
from alignment.costs.shadows import zeros
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.models.assembly.adapters import OWN, put_in_order
from alignment.models.assembly.load import Lineage, base_record, lineage, refuse_other_tokenizer
from alignment.models.assembly.roles import adapters_below, load_start, saved_as, turn_off_dropout
from alignment.training.context import StageContext
from alignment.training.finite import refuse_weights
from alignment.training.session import fresh_folder
from alignment.training.sharding import is_sharded, whole_state


def initial_policy(context: StageContext) -> tuple[Lineage, Any]:
    """The policy's lineage and its tokenizer, with the run's chat template."""
    spec = context.spec
    context.progress("loading")
    init = spec.inputs["init"]
    start = lineage(spec, init)
    tokenizer = load_tokenizer(start.base, spec.model.template)
    if init.path is not None and init.path != start.base:  # a whole model brings its own
        refuse_other_tokenizer(spec, init, tokenizer)
    return start, tokenizer


def initial_model(
    context: StageContext, start: Lineage, task: TaskType, *, may_drop: bool
) -> PreTrainedModel | PeftModel:
    """The model that the stage trains, with the stage's adapter (alignment/models/assembly/roles.py). ``may_drop``
    allows dropout. A stage that compares two passes of one model must not allow it, because each pass would drop
    different values."""
    context.phase("loading")
    sharded = context.spec.sharding.of_weights
    model = load_start(
        start, context.adapter, context.spec.model.dtype, task=task, device=context.device, sharded=sharded
    )
    if not may_drop:
        turn_off_dropout(model)
    return model


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """The parts of the manifest that differ between stages; the files are already in the context's content folder."""

    metrics: dict[str, float]
    base: dict[str, Any] = field(default_factory=dict)
    adapters: list[str] = field(default_factory=list)
    adapters_stood: dict[str, dict[str, bool]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def save_model(
    model: PreTrainedModel | PeftModel, tokenizer: Any, context: StageContext, start: Lineage, metrics: dict[str, float]
) -> StageResult:
    """Saves the tokenizer and a trained model: the whole model, or its adapter and the adapters below it. If the base
    is another artifact's own model, it is copied too. The folders are plain transformers and PEFT folders. Only the
    main process writes, but all processes must call this, because weights may be sharded."""
    is_adapter = isinstance(model, PeftModel)
    refuse_weights((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    state = _state(model, trained_only=is_adapter)
    if not context.is_main:
        return StageResult(metrics=metrics)
    tokenizer.save_pretrained(str(fresh_folder(context, TOKENIZER)))
    hashes = tokenizer_hashes(tokenizer)
    if not is_adapter:
        folder = fresh_folder(context, "model")
        model.config.use_cache = True  # it is off during training, but generation needs it
        if on_shadows():
            model.config.save_pretrained(str(folder))
        else:
            model.save_pretrained(str(folder), state_dict=state)
        tokenizer.save_pretrained(str(folder))
        return StageResult(metrics=metrics, base={"source": "self"}, hashes=hashes)
    if start.source == "self":  # the base is another artifact's own model; this artifact must not depend on that one
        if (estimate := recorder()) is not None:
            estimate.copied_bytes = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad)
        shutil.copytree(start.base, fresh_folder(context, "model"), dirs_exist_ok=True)
    below = adapters_below(start, context.adapter)
    own = fresh_folder(context, f"adapters/{len(below)}-{context.spec.stage}")
    if state is not None and model.active_peft_config.is_prompt_learning:
        prefix = state[f"prompt_encoder.{OWN}.embedding.weight"]  # PEFT does not take it from a state
        model.get_prompt_embedding_to_save = lambda _: prefix
    # Frozen adapters next to it have their own folders.
    model.save_pretrained(str(own), selected_adapters=[OWN], state_dict=state)
    put_in_order(own, base=context.spec.artifact / "model" if start.source == "self" else None)
    (own / "README.md").unlink(missing_ok=True)  # an empty template
    saved = {}
    for index, adapter in enumerate((*below, saved_as(start, context.adapter, own))):
        name = adapter.path.name if adapter.path.name.startswith(f"{index}-") else f"{index}-{adapter.path.name}"
        saved[f"adapters/{name}"] = {"merged": adapter.merged, "nf4": adapter.nf4}
        if adapter.path != own:
            shutil.copytree(adapter.path, own.with_name(name), dirs_exist_ok=True, ignore=_all_but_adapter)
    base = base_record(context.spec, start)
    return StageResult(metrics=metrics, base=base, adapters=list(saved), adapters_stood=saved, hashes=hashes)


def _all_but_adapter(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name not in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]


def _state(model: PreTrainedModel | PeftModel, *, trained_only: bool) -> dict[str, Tensor] | None:
    if on_shadows() and trained_only:
        return zeros({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    return whole_state(model, trained_only=trained_only) if is_sharded(model) else None
