"""The trial of the largest micro-batch leaves nothing behind on several processes, and is left out where weights are
sharded."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.config.launch import Sharding
from tests.chained import LORA, Chained
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


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
