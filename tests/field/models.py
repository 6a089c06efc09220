"""Tiny random models of the real configurations of each architecture, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.field.draws import FAMILIES
from tests.tiny import tiny_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path, architecture: str, *, biased: bool) -> None:
    """Weights are large enough that distributions are far from uniform; biases are random where there are some."""
    tokenizer = tiny_tokenizer()
    others = {"attention_bias": True} if biased and architecture not in ("qwen2", "gpt_neox") else {}
    config = AutoConfig.for_model(architecture, **SIZES, vocab_size=len(tokenizer), **FAMILIES[architecture], **others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name.endswith(".bias"):
                torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
