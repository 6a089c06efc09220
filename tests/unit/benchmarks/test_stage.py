"""The benchmark's stage file is one that a worker can read, whatever was added to it since."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.stages.stage_file import read_spec
from benchmarks.stage import stage_config, write_stage


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "ppo", "grpo"])
def test_a_worker_reads_what_the_benchmark_writes(kind: str, tmp_path: Path) -> None:
    config = stage_config(kind, "lora", tmp_path / "rows.jsonl", steps=3, rows=8)
    spec = read_spec(write_stage(tmp_path, config, base=tmp_path, data=tmp_path / "rows.jsonl"))
    assert spec.config == config
