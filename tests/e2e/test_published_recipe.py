"""A published recipe fits on its published card, by its plan: Zephyr with QLoRA on 24 GB (alignment-handbook)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import MistralConfig

from alignment.costs.devices import DEVICES
from alignment.pipeline.execute import estimates
from alignment.pipeline.plan.plan import make_plan
from alignment.pipeline.sources.model_sources import resolve_shapes
from tests.tiny import tiny_tokenizer

MISTRAL_7B = MistralConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32_768,
    sliding_window=4096,
    tie_word_embeddings=False,
)
WEIGHTS = 7_241_732_096
"""As the model's page has it."""
LAYERS = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14_336)
SENTENCE = "the keys are in the hall "
"""About seven tokens."""


@pytest.mark.processes  # half a minute
def test_zephyrs_recipe_fits_on_its_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    MISTRAL_7B.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": SENTENCE * 280}]
    pair = {"prompt": "Where?", "chosen": SENTENCE * 135, "rejected": f"No, {SENTENCE * 135}"}
    rows = {"sft": {"messages": turns}, "dpo": pair}  # nearly as long as the recipe allows
    overrides = [f"model.source=path:{base}", f"output={tmp_path / 'out'}"]
    for stage, row in rows.items():
        (tmp_path / f"{stage}.jsonl").write_text((json.dumps(row) + "\n") * 16, encoding="utf-8")
        overrides += [f"stages.{stage}.data.source=path:{tmp_path / stage}.jsonl", f"stages.{stage}.data.split=train"]
    card = DEVICES["4090"]
    plan = make_plan("zephyr_7b_dpo_qlora", overrides, find=resolve_shapes)
    cost = estimates.estimate(plan, device="4090", memory=card.memory, announce=lambda _: None)
    assert [stage.stage for stage in cost.stages] == ["sft", "dpo"]
    for stage in cost.stages:
        assert stage.error == ""
        assert stage.remedy == []
        assert stage.peak < card.memory
        parts = max(stage.phases.values(), key=lambda phase: phase.peak).parts
        in_four_bits = LAYERS * 4.127 / 8 + (WEIGHTS - LAYERS) * 2
        assert parts["weights"] == pytest.approx(in_four_bits, rel=0.01)
        assert stage.host > 2 * WEIGHTS, "the weights are read in 16 bits"
