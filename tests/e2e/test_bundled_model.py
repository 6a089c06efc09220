"""One stage of the bundled model as the quickstart trains it: real weights, in bfloat16, by the user's command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.core.artifacts import verify
from alignment.pipeline.sources import bundled_model
from tests.e2e.conftest import Align

MODEL = bundled_model.lookup("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    not bundled_model.is_ready(MODEL), reason="no bundled model on this machine; `make model` fetches it"
)
def test_the_bundled_model_learns_in_bfloat16(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    rows = tmp_path / "one_short_row.jsonl"  # a row of the quickstart takes two minutes on a CPU without bfloat16
    turns = [{"role": "user", "content": "When is it open?"}, {"role": "assistant", "content": "The shop opens at 9."}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    align = replace(new_forked(), recipe="quickstart")
    others = [f"~stages.{stage}" for stage in ("reward", "dpo", "ppo", "evaluate", "report")]
    optim = "{batch_size: 1, max_steps: 3, lr: 2e-3, schedule: constant, warmup_ratio: 0.0, micro_batch_tokens: 512}"
    overrides = (f"model.source=bundled:{MODEL.name}", "model.dtype=bfloat16", f"stages.sft.optim={optim}")
    align("run", *others, *overrides, f"stages.sft.data.source=path:{rows}")
    artifact = align.artifact("sft")
    manifest = verify(artifact, content=True)
    assert manifest.identity["base"] == {"content": f"gguf-sha256:{MODEL.sha256}", "dtype": "bfloat16"}
    losses = [json.loads(line)["loss"] for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.05, "the same row three times"
    factors = load_file(artifact / "adapters/0-sft/adapter_model.safetensors")
    assert {held.dtype for held in factors.values()} == {torch.float32}, "factors have masters, products are bfloat16"
    base = AutoModelForCausalLM.from_pretrained(bundled_model.folder(MODEL), dtype=torch.bfloat16)
    assert base.dtype is torch.bfloat16
    assert PeftModel.from_pretrained(base, artifact / "adapters/0-sft").active_adapter == "default"
