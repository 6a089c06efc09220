"""Putting an adapter on a model, and taking the sum of what was learned."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.errors import ModelError
from alignment.models.products import fuse_adapters


def add_adapter(model: PreTrainedModel, config: AdapterConfig, task: TaskType) -> PreTrainedModel | PeftModel:
    """The model with a fresh adapter that changes nothing yet, or the model itself for full training.

    Raises:
        ModelError: the target modules do not exist in this model.
    """
    if config.kind is AdapterKind.full:
        return model
    targets: str | list[str] = list(config.target_modules)
    if config.target_modules == ["all-linear"]:
        targets = "all-linear"
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type=task
    )
    try:
        return compute_in_base_dtype(get_peft_model(model, lora))
    except ValueError as error:
        raise ModelError(
            f"the adapter does not fit: {error}",
            where="adapter.target_modules",
            remedy="name linear modules of this model, or use ['all-linear']",
        ) from error


def compute_in_base_dtype(model: PeftModel) -> PeftModel:
    """Lets autocast choose the products' dtype; the factors themselves stay float32 for the optimiser.

    PEFT would convert every activation to float32 and back around each adapter, which costs a third of a step on CPU.
    Plain low-rank layers become one function each (alignment/models/products.py).
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
    fuse_adapters(model)
    return model


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with a saved adapter added into its weights.

    Raises:
        ModelError: the adapter was made for another architecture.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("no adapter_model.safetensors here", where=str(folder), remedy="pickled adapters are not read")
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"this adapter does not fit the model: {error}", where=str(folder)) from error
