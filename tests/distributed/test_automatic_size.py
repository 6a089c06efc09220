"""Two processes choose one size of micro-batches, and then train as with that number set by hand."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.launch import Sharding
from alignment.config.model import AdapterConfig
from alignment.config.optim import Automatic, with_tokens
from alignment.config.scoring import ScorerConfig
from alignment.core.artifacts import read_manifest
from alignment.job import StageSpec
from tests.chained import FULL, LORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
PPO = {"reward": None, "scorers": [ScorerConfig(source="length", target=5)]}


def trained(folder: Path, kind: str, adapter: AdapterConfig, sharding: Sharding, size: int | Automatic) -> StageSpec:
    config: Any = config_of(kind, adapter, **(PPO if kind == "ppo" else {}))
    config = with_tokens(config, size) if isinstance(size, int) else automatic(config)
    spec = replace(Chained(folder).spec(kind, adapter, config=config), sharding=sharding)
    assert on_processes(spec) == [0, 0], logs(spec)
    return spec


def automatic(config: Any) -> Any:
    return replace(config, optim=replace(config.optim, micro_batch_tokens=Automatic.auto))


def outcome(spec: StageSpec) -> dict[str, Any]:
    lines = [json.loads(line) for line in (spec.artifact / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {file.name: file.read_bytes() for file in sorted(spec.artifact.rglob("*.safetensors"))},
        "lines": [{k: v for k, v in line.items() if not k.startswith(("seconds", "time/"))} for line in lines],
    }


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding"),
    [
        ("dpo", LORA, Sharding.none),
        ("ppo", LORA, Sharding.none),
        ("ppo", LORA, Sharding.zero2),
        ("sft", LORA, Sharding.zero2),
        ("dpo", FULL, Sharding.fsdp),
        ("sft", FULL, Sharding.zero3),
    ],
    ids=lambda value: getattr(value, "kind", getattr(value, "value", value)),
)
def test_two_processes_train_as_with_the_size_that_they_chose(
    tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding
) -> None:
    chose = trained(tmp_path / "auto", kind, adapter, sharding, Automatic.auto)
    manifest = read_manifest(chose.artifact)
    assert manifest is not None
    tokens = int(manifest.usage["micro_batch_tokens"])
    by_hand = trained(tmp_path / "by-hand", kind, adapter, sharding, tokens)
    assert outcome(chose) == outcome(by_hand)
    (file,) = (chose.artifact.parent / "cache").glob("micro-batch-*.json")
    (size,) = json.loads(file.read_text())["sizes"]
    shared = "" if sharding is Sharding.none else f", {sharding.value}"
    assert (size["tokens"], size["launch"]) == (tokens, f"2 processes{shared}")
