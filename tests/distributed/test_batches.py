"""Micro-batches on several processes: one size for all, a trial that leaves nothing, means over all tokens."""

from __future__ import annotations

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
from tests.distributed.test_sharding import lines_of, logs, needs_deepspeed, run_on, shared_out, steadied

PPO = {"reward": None, "scorers": [ScorerConfig(source="length", target=5)]}


def trained(folder: Path, kind: str, adapter: AdapterConfig, sharding: Sharding, size: int | Automatic) -> StageSpec:
    config: Any = config_of(kind, adapter, **(PPO if kind == "ppo" else {}))
    if isinstance(size, int):
        config = with_tokens(config, size)
    else:
        config = replace(config, optim=replace(config.optim, micro_batch_tokens=size))
    return run_on(shared_out(Chained(folder), kind, adapter, sharding, config=config))


def outcome(spec: StageSpec) -> dict[str, Any]:
    return {
        "weights": {file.name: file.read_bytes() for file in sorted(spec.artifact.rglob("*.safetensors"))},
        "lines": [{k: v for k, v in line.items() if not k.startswith(("seconds", "time/"))} for line in lines_of(spec)],
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


def weights_of(folder: Path, kind: str, sharding: Sharding, *, tries: bool) -> dict[str, bytes]:
    spec = replace(Chained(folder).spec(kind, LORA), sharding=sharding)
    assert on_processes(spec, tries_longest=tries) == [0, 0], logs(spec)
    logged = [(spec.run_folder / f"log-{rank}.txt").read_text().count("tried") for rank in range(2)]
    assert logged == [int(tries and sharding is Sharding.none)] * 2
    return {path.name: path.read_bytes() for path in sorted(spec.artifact.rglob("*.safetensors"))}


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "sharding"),
    [("sft", Sharding.none), ("dpo", Sharding.none), ("sft", Sharding.fsdp), ("sft", Sharding.zero2)],
    ids=lambda value: getattr(value, "value", value),
)
def test_two_processes_learn_the_same_after_a_trial(tmp_path: Path, kind: str, sharding: Sharding) -> None:
    tried, plain = (weights_of(tmp_path / str(tries), kind, sharding, tries=tries) for tries in (True, False))
    assert tried == plain


@pytest.mark.parametrize("kind", ["sft", "cpt"])
def test_figures_of_tokens_are_those_of_one_process(tmp_path: Path, kind: str) -> None:
    """Each row is a micro-batch, and the two processes learn from rows of different lengths in each."""
    config: Any = steadied(kind, LORA)
    config = replace(config, optim=replace(config.optim, micro_batch_tokens=1, max_steps=2))
    specs = [Chained(tmp_path / str(number)).spec(kind, LORA, config=config) for number in (1, 2)]
    alone, both = (lines_of(run_on(spec, number)) for number, spec in enumerate(specs, 1))
    assert len(both) == len(alone) > 1
    for line, other in zip(both, alone, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
