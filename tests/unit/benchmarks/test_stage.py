"""The benchmark's stage file is one that a worker can read, and others get rows in the order of that stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.stages.sft.run import run
from alignment.stages.stage_file import read_spec
from alignment.training.context import StageContext
from alignment.training.micro_batches import MicroBatches
from benchmarks.prepare import in_our_order
from benchmarks.stage import stage_config, write_stage
from tests.tiny import save_tiny_model


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_worker_reads_what_the_benchmark_writes(kind: str, tmp_path: Path) -> None:
    config = stage_config(kind, "lora", tmp_path / "rows.jsonl", steps=3, rows=8)
    spec = read_spec(write_stage(tmp_path, config, base=tmp_path, data=tmp_path / "rows.jsonl"))
    assert spec.config == config


def test_others_take_rows_in_the_order_of_our_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"messages": [{"role": "user", "content": "Say."}, _answer("x" * (i + 1))]} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = stage_config("sft", "lora", data, steps=3, rows=8)
    spec = read_spec(write_stage(tmp_path, config, base=save_tiny_model(tmp_path / "model"), data=data))
    for name in ("content", "checkpoints"):
        (spec.work / name).mkdir()
    batches: list[list[int]] = []
    step = MicroBatches.training_step

    def noted(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        batches.append((inputs["labels"] != -100).sum(-1).tolist())
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(MicroBatches, "training_step", noted)
    run(config, StageContext(spec=spec, rank=0, world_size=1))
    lengths = sorted(length for batch in batches for length in batch)
    assert len(set(lengths)) == 24, "a row's number is seen in the length of its answer"
    order = in_our_order("sft", "lora", tmp_path, list(range(24)))
    assert [[lengths.index(length) for length in batch] for batch in batches] == [order[:8], order[8:16], order[16:]]
    assert order != sorted(order)


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
