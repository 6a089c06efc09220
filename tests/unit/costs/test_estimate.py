"""What whole stages would need, against published figures and against what can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind, Dtype, ModelConfig
from alignment.config.optim import OptimConfig
from alignment.costs.devices import DEVICES, THIS
from alignment.costs.shadows import Key, Operation
from alignment.estimate import Timer, cost_of
from alignment.records.cost import StageCost
from alignment.stages.sft.kind import SftConfig
from tests.tiny import tiny_spec, tiny_tokenizer

LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    tie_word_embeddings=False,
)
WEIGHTS_OF_8B = 8_030_261_248
"""As the model's page has it."""

LINEAR_OF_LAYER = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
TWO_LAYERS = LlamaConfig(**{**LLAMA_8B.to_dict(), "num_hidden_layers": 2})

Estimate = Callable[..., StageCost]


@pytest.fixture
def estimate(tmp_path: Path) -> Estimate:
    """The cost on an H100 of a stage that learns from two rows of some words."""

    def cost(
        model: PreTrainedConfig,
        adapter: AdapterConfig,
        *,
        words: int,
        max_length: int = 1024,
        timer: Timer | None = None,
    ) -> StageCost:
        base = tmp_path / "base"
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(_row(words)) + "\n" for _ in range(2)), encoding="utf-8")
        config = SftConfig(
            adapter=adapter,
            data=DataConfig(source=f"path:{rows}"),
            optim=OptimConfig(lr=1e-5, batch_size=1, activation_checkpointing=True),
            max_length=max_length,
        )
        spec = replace(
            tiny_spec(tmp_path / "work", config),
            base_path=base,
            data_path=rows,
            model=ModelConfig(source=f"path:{base}", dtype=Dtype.bfloat16),
        )
        return cost_of(spec, timer or Timer("h100"), publishes=False)

    return cost


class FreeOperations(Timer):
    """A device on which operations take no time."""

    def seconds(self, key: Key, operation: Operation, *, bytes_between: float) -> float:
        return 0.0


def _row(words: int) -> dict[str, Any]:
    turn = {"role": "user", "content": "the keys " * (words // 2)}
    return {"messages": [turn, {"role": "assistant", "content": "the hall " * (words // 2)}]}


def test_adam_takes_sixteen_bytes_a_weight(estimate: Estimate) -> None:
    """Four for the weight, its gradient and each of its two moments (Rajbhandari et al. 2020, section 3.1)."""
    cost = estimate(TWO_LAYERS, AdapterConfig(kind=AdapterKind.full), words=40)
    assert cost.error == ""
    assert cost.weights == cost.trained == 2 * 128_256 * 4096 + 2 * (LINEAR_OF_LAYER + 2 * 4096) + 4096
    parts = max(cost.phases.values(), key=lambda phase: phase.peak).parts
    states = parts["weights"] + parts["gradients"] + parts["optimiser"]
    # The embedding's gradient is counted as an activation until it is complete.
    assert states == pytest.approx(16 * cost.weights, rel=0.15)
    assert cost.peak > 16 * cost.weights


def test_qlora_on_eight_billion_weights_fits_on_a_card_of_24_gb(estimate: Estimate) -> None:
    """Dettmers et al. 2023 train 7 and 13 billion weights on one card of 24 GB, rows of 512 tokens."""
    cost = estimate(LLAMA_8B, AdapterConfig(kind=AdapterKind.qlora), words=1000, max_length=4096)
    assert cost.error == ""
    linear = 32 * LINEAR_OF_LAYER
    others = WEIGHTS_OF_8B - linear  # embeddings, head and norms stay in bfloat16
    parts = max(cost.phases.values(), key=lambda phase: phase.peak).parts
    assert parts["weights"] == pytest.approx(linear * 4.127 / 8 + others * 2, rel=0.02)
    assert cost.host > 2 * WEIGHTS_OF_8B
    assert 7e9 < cost.peak < DEVICES["4090"].memory


def test_python_between_operations_takes_time_on_a_cpu_only(estimate: Estimate) -> None:
    """Two layers forward and backward are hundreds of operations, each with at least 10 microseconds of Python."""
    full = AdapterConfig(kind=AdapterKind.full)
    small = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    on_cpu = estimate(small, full, words=40, timer=FreeOperations(THIS))
    on_gpu = estimate(small, full, words=40, timer=FreeOperations("h100"))
    assert on_cpu.error == on_gpu.error == ""
    assert 100e-5 < on_cpu.phases["training"].seconds / on_cpu.steps < 2000e-5
    assert on_gpu.phases["training"].seconds == 0
