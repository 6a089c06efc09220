"""What TRL and plain transformers share when they train: rows, model, adapter. Nothing of ``alignment`` is used."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.measure import device
from benchmarks.setting import LORA, SEED, WITHOUT_AUTOCAST, WITHOUT_INPUT_CASTS


def tokenizer_of(task: dict[str, Any]) -> Any:
    """The base's tokenizer, padding with its unknown token: where pad is EOS, transformers scores a row too early."""
    tokenizer = AutoTokenizer.from_pretrained(task["base"])
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def model_of(task: dict[str, Any], tokenizer: Any) -> Any:
    """bfloat16 below an adapter, float32 where it is trained whole (autocast does the products), as ours has it.

    The attention is that of the setting, and so is whether layers are compiled.

    A scorer's head is the one that our stage draws, so that all start from the same loss.
    """
    torch.manual_seed(SEED)
    how = {
        "dtype": torch.bfloat16 if task["adapter"] == "lora" else torch.float32,
        "attn_implementation": task["setting"]["attention"],
    }
    if task["kind"] != "reward":
        model = AutoModelForCausalLM.from_pretrained(task["base"], **how)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(task["base"], num_labels=1, **how)
        model.score.float()
        with torch.no_grad():
            model.score.weight.copy_(load_file(Path(task["head"]))["weight"])
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    if task["setting"]["layers_compiled"]:
        _compile_layers(model)
    return model.to(device())


def lora_of(task: dict[str, Any]) -> LoraConfig | None:
    """The same adapter for everyone; None where all weights are trained."""
    if task["adapter"] != "lora":
        return None
    return LoraConfig(task_type="SEQ_CLS" if task["kind"] == "reward" else "CAUSAL_LM", **LORA)


def input_casts(task: dict[str, Any], model: Any) -> AbstractContextManager[Any]:
    """With PEFT's conversions of each activation to float32 around each adapter, or spared them, as the setting says.

    Under autocast they change no result, because autocast chooses the dtype of products.
    """
    spared = task["setting"]["precision"] == WITHOUT_INPUT_CASTS
    return disable_input_dtype_casting(model) if spared else nullcontext()


def _compile_layers(model: Any) -> None:
    """Compiles each layer of a model. They are alike, so code is made once for all of them.

    By default ``torch.compile`` gives up after 8 shapes, and runs other shapes uncompiled without a word.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for layer in model.model.layers:
        layer.compile()


def uses_autocast(task: dict[str, Any]) -> bool:
    """Whether the setting has autocast to bfloat16."""
    return bool(task["setting"]["precision"] != WITHOUT_AUTOCAST)


def with_adapter(model: Any) -> Any:
    """The critic with the adapter that ours has: in its linear layers, in float32, beside a head that is trained too.

    The layers are replaced inside the model, because TRL calls its backbone and its head by themselves.
    """
    model = inject_adapter_in_model(LoraConfig(task_type="SEQ_CLS", **LORA), model)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    model.score.requires_grad_(True)
    return model
