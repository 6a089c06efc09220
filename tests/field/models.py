"""Tiny random models of the real configurations of each architecture, with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.field.draws import FAMILIES, REAL
from tests.real_templates import dressed, text_of
from tests.templates import styled_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def save_model(folder: Path, architecture: str, *, biased: bool, template: str) -> None:
    """Weights are large enough that distributions are far from uniform; biases are random where there are some."""
    tokenizer: Any = dressed_as(template)
    others = {"attention_bias": True} if biased and architecture not in ("qwen2", "gpt_neox") else {}
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id or end}
    sizes = {**SIZES, **ids, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(architecture, **sizes, **FAMILIES[architecture], **others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith(".bias"):
                torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def dressed_as(template: str) -> Any:
    """A tokenizer with a template of ours or a real one, whose options are a setting of the recipe."""
    if template not in REAL:
        return styled_tokenizer(template)
    return dressed(REAL[template].family, text_of(REAL[template].name) or "")
