"""With sharded weights no process holds a whole model of its own while it loads, and every number is the file's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from alignment.config.data import DataConfig
from alignment.config.launch import Sharding
from alignment.config.model import AdapterConfig, Dtype, ModelConfig
from alignment.config.optim import OptimConfig
from alignment.job import StageSpec
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.chained import FULL, LORA, Chained
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import alike, figures, logs, run_on, shared_out, steadied, weights
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE, tiny_spec, tiny_tokenizer

ZERO3, FSDP = Sharding.zero3, Sharding.fsdp


MB = 10**6


SLACK = 60 * MB
"""For all that is no weight: activations of short rows, buffers of the communication, what libraries take at first."""


ROWS = {
    "conversations": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    "preferences": {"messages": [{"role": "user", "content": "Hi"}], "chosen": "Hello.", "rejected": "Go."},
}


BFLOAT16 = ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)


pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 143 million weights in bfloat16, of which each of 12 layers holds a twelfth."""
    folder = tmp_path_factory.mktemp("large") / "base"
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def large(folder: Path, base: Path, kind: str, adapter: AdapterConfig, sharding: Sharding) -> StageSpec:
    (folder / "base").symlink_to(base)
    data = folder / "rows.jsonl"
    row = ROWS["conversations" if kind == "sft" else "preferences"]
    data.write_text("".join(json.dumps({"id": f"row-{number}", **row}) + "\n" for number in range(2)))
    settings: dict[str, Any] = {
        "adapter": adapter,
        "data": DataConfig(source=str(folder)),
        "optim": OptimConfig(lr=1e-3, batch_size=2),
    }
    config = SftConfig(**settings) if kind == "sft" else DpoConfig(**settings)
    return tiny_spec(folder, config, data_path=data, model=BFLOAT16, sharding=sharding)


@pytest.mark.parametrize("sharding", [ZERO3, FSDP], ids=lambda sharding: sharding.value)
@pytest.mark.parametrize(
    ("kind", "adapter", "whole_bytes", "copied_bytes"),  # of each weight
    [
        ("sft", FULL, 4, 4),  # masters
        ("dpo", FULL, 4 + 2, 4),  # and a reference in the format of the products
        ("sft", LORA, 2, 2),  # a base in the format of the products
    ],
    ids=["sft-full", "dpo-full", "sft-lora"],
)
def test_a_process_holds_its_shares_and_one_module(
    tmp_path: Path,
    base: Path,
    kind: str,
    adapter: AdapterConfig,
    whole_bytes: int,
    copied_bytes: int,
    sharding: Sharding,
) -> None:
    spec = large(tmp_path, base, kind, adapter, sharding)
    assert on_processes(spec, watches_memory=True) == [0, 0], logs(spec)
    stored = load_file(base / "model.safetensors")
    num_weights = sum(weight.numel() for weight in stored.values())
    whole = whole_bytes * num_weights
    layer = copied_bytes * sum(weight.numel() for name, weight in stored.items() if ".layers.0." in name)
    allowed = whole / 2 + 2 * layer + SLACK
    assert allowed < 0.9 * whole
    for rank in range(2):
        memory = json.loads((spec.run_folder / f"memory-{rank}.json").read_text())
        assert memory["wrong"] == []
        assert memory["after_loading"]["own"] < SLACK, "weights are not read before they are needed"
        before = allowed - copied_bytes * num_weights / 2  # shares of what is frozen, if there is a reference
        assert memory["peaks"]["loading"] < before, (memory["peaks"], before)
        assert memory["peaks"]["cutting"] < allowed, (memory["peaks"], allowed)
        assert memory["cut"]["own"] > 0.9 * whole / 2, "its shares are its own"


def small_in_bfloat16(folder: Path) -> Chained:
    chained = Chained(folder)
    model = AutoModelForCausalLM.from_pretrained(str(chained.base), dtype=torch.bfloat16)
    model.save_pretrained(str(chained.base))
    return chained


@pytest.mark.parametrize(
    ("kind", "sharding"),
    [("sft", FSDP), ("sft", ZERO3), ("reward", FSDP), ("reward", ZERO3), ("dpo", FSDP), ("dpo", ZERO3), ("kto", FSDP)],
    ids=lambda value: getattr(value, "value", value),
)
def test_what_is_loaded_in_another_format_than_it_is_trained_in_trains_the_same(
    tmp_path: Path, kind: str, sharding: Sharding
) -> None:
    """In float32, where another weight would show in all figures."""
    runs = []
    for world_size, launch in ((1, Sharding.none), (2, sharding)):
        chained = small_in_bfloat16(tmp_path / launch.value)
        spec = run_on(shared_out(chained, kind, FULL, launch, config=steadied(kind, FULL)), world_size)
        config = json.loads((spec.artifact / "model" / "config.json").read_text())
        runs.append((figures(spec.artifact, kind), weights(spec.artifact), config))
    (alone, their_weights, their_config), (together, our_weights, our_config) = runs
    close(together, alone, atol=1e-4, rtol=1e-4)
    assert our_config == their_config
    alike(our_weights, their_weights, atol=1e-5)
    assert {weight.dtype for weight in our_weights.values()} == {weight.dtype for weight in their_weights.values()}
