"""Llama (Touvron et al. 2023, section 2.2, with grouped queries) in float64 NumPy, and LoRA (Hu et al. 2021, 4.1).
Without torch, a server with this model starts in a fraction of a second."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]
_ADAPTED = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The weights by their names in a checkpoint of transformers, and its ``config.json``."""

    config: Mapping[str, Any]
    weights: Mapping[str, Array]

    @classmethod
    def load(cls, folder: Path) -> Llama:
        """The model in a folder with float32 weights."""
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "llama"
        return cls(config=config, weights=_read(folder / "model.safetensors"))

    def with_weights(self, folder: Path) -> Llama:
        """The same model with the weights of another folder. Raises KeyError: some are missing there."""
        weights = _read(folder / "model.safetensors")
        tied = {"lm_head.weight"} if self.config["tie_word_embeddings"] else set()
        if missing := set(self.weights) - set(weights) - tied:
            raise KeyError(f"weights were not initialized: {sorted(missing)}")
        return replace(self, weights={name: weights[name] for name in self.weights if name in weights})

    def with_adapter(self, folder: Path) -> Llama:
        """W + (alpha / r) · B A for every matrix that PEFT's adapter has."""
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["use_dora"], config["use_rslora"]) == ("LORA", False, False)
        adapter = _read(folder / "adapter_model.safetensors")
        merged = dict(self.weights)
        for name in adapter:
            if match := _ADAPTED.fullmatch(name):
                product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
                merged[f"{match[1]}.weight"] = self.weights[f"{match[1]}.weight"] + (
                    config["lora_alpha"] / config["r"] * product
                )
        return replace(self, weights=merged)

    def logits(self, ids: Sequence[int]) -> Array:
        """``[vocabulary]`` for the token after ``ids``."""
        embeddings = self.weights["model.embed_tokens.weight"]
        hidden = embeddings[list(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = hidden + self._attention(layer, self._normed(f"model.layers.{layer}.input_layernorm", hidden))
            normed = self._normed(f"model.layers.{layer}.post_attention_layernorm", hidden)
            hidden = hidden + self._feed_forward(layer, normed)
        last = self._normed("model.norm", hidden[-1])
        head = embeddings if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]
        return np.asarray(head @ last)

    def _attention(self, layer: int, hidden: Array) -> Array:
        length, group = len(hidden), self.config["num_attention_heads"] // self.config["num_key_value_heads"]
        prefix = f"model.layers.{layer}.self_attn"
        queries, keys, values = (
            self._linear(f"{prefix}.{name}_proj", hidden).reshape(length, -1, self._width) for name in "qkv"
        )
        queries, keys = self._rotated(queries), self._rotated(keys)
        keys, values = (np.repeat(states, group, axis=1) for states in (keys, values))
        scores = np.einsum("ihd,jhd->hij", queries, keys) / np.sqrt(self._width)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        mixed = np.einsum("hij,jhd->ihd", _softmax(scores), values)
        return self._linear(f"{prefix}.o_proj", mixed.reshape(length, -1))

    def _feed_forward(self, layer: int, hidden: Array) -> Array:
        prefix = f"model.layers.{layer}.mlp"
        gate = self._linear(f"{prefix}.gate_proj", hidden)
        silu = gate / (1 + np.exp(-gate))
        return self._linear(f"{prefix}.down_proj", silu * self._linear(f"{prefix}.up_proj", hidden))

    def _linear(self, name: str, hidden: Array) -> Array:
        return hidden @ self.weights[f"{name}.weight"].T

    def _normed(self, name: str, hidden: Array) -> Array:
        scale = np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return hidden / scale * self.weights[f"{name}.weight"]

    def _rotated(self, states: Array) -> Array:
        """Elements i and i + d/2 of each head are turned by position · theta^(−2i/d)."""
        half = self._width // 2
        theta = self.config.get("rope_parameters", self.config)["rope_theta"]
        angles = np.arange(len(states))[:, None, None] * theta ** (-np.arange(half) / half)
        first, second = states[..., :half], states[..., half:]
        return np.concatenate(
            [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)], -1
        )

    @property
    def _width(self) -> int:
        heads: int = self.config["num_attention_heads"]
        return int(self.config.get("head_dim") or self.config["hidden_size"] // heads)


def log_softmax(logits: Array) -> Array:
    """Over the last dimension."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _softmax(scores: Array) -> Array:
    return np.asarray(np.exp(log_softmax(scores)))


def _read(file: Path) -> dict[str, Array]:
    return {name: weight.astype(np.float64) for name, weight in load_file(file).items()}
