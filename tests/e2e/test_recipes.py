"""Recipes for GPUs, scaled down: a tiny model and a few of the shipped rows in place of theirs, all else as written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.artifacts import verify
from alignment.pipeline.compose import compose
from tests.e2e.conftest import Align
from tests.tiny import pythia_tokenizer, save_tiny_model

DATA = {"sft": "conversations", "reward": "preferences", "dpo": "preferences", "ppo": "preferences"}


@pytest.mark.parametrize("recipe", ["zephyr_7b_dpo_qlora", "llama_8b_rlhf_qlora"])
def test_a_recipe_for_gpus_runs_scaled_down(new_align: Callable[[], Align], recipe: str) -> None:
    align = replace(new_align(), recipe=recipe)
    stages = list(compose(recipe, []).tree["stages"])
    told = [f"stages.{stage}.data={{source: 'bundled:quickstart/{DATA[stage]}', split: train}}" for stage in stages]
    told += [f"stages.{stage}.max_prompt_length=4000" for stage in stages if stage == "dpo"]
    if "ppo" in stages:
        told.append("stages.ppo.guard={every: 2, prompts: 2}")
    printed = align("run", *told)
    assert {entry["state"] for entry in align.stages().values()} == {"done"}, printed
    for stage in stages:
        stood = verify(align.artifact(stage), content=True).adapters_stood
        assert all(one["nf4"] for one in stood.values())
        assert [one["merged"] for one in stood.values()] == [True, *[False] * (len(stood) - 1)]


def _tulu_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in allenai/tulu-3-sft-mixture and allenai/llama-3.1-tulu-3-8b-preference-mixture."""
    asks = {"role": "user", "content": f"Write a constraint-following poem about the number {number}. " * 3}
    good, bad = ({"role": "assistant", "content": f"{word} {number}, in rows of {number}."} for word in ("Number", "I"))
    told = {"id": f"row_{number}", "source": "ai2-adapt-dev/personas"}
    pair = {"prompt": asks["content"], "chosen": [asks, good], "rejected": [asks, bad]}
    return {**told, "messages": [asks, good]}, {**told, **pair}


def _tldr_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in trl-lib/tldr and trl-lib/tldr-preference."""
    post = f"SUBREDDIT: r/dogs\n\nTITLE: Dog number {number}\n\nPOST: {'It barks. ' * number}\n\nTL;DR:"
    good, bad = f" Dog {number} barks, what to do?", f" I have {number} dogs."
    return {"prompt": post, "completion": good}, {"prompt": post, "chosen": good, "rejected": bad}


PUBLIC = {
    "tulu3_8b_sft_dpo": ("llama", _tulu_row, {"sft": 0, "dpo": 1}),
    "tldr_1b_ppo": ("gpt_neox", _tldr_row, {"sft": 0, "reward": 1, "ppo": 0}),
}
"""The recipe's architecture, its two data sets row by row, and which of them each stage reads."""


@pytest.mark.parametrize("recipe", PUBLIC)
def test_a_recipe_trains_as_smoke_on_rows_like_the_public_ones(tmp_path: Path, recipe: str) -> None:
    architecture, row, reads = PUBLIC[recipe]
    tokenizer = pythia_tokenizer() if architecture == "gpt_neox" else None
    model = save_tiny_model(tmp_path / "model", architecture=architecture, tokenizer=tokenizer)
    files = [tmp_path / "turns.jsonl", tmp_path / "pairs.jsonl"]
    for file, rows in zip(files, zip(*map(row, range(1, 11)), strict=True), strict=True):
        file.write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    align = Align(output=tmp_path, model=model, recipe=recipe, profile="smoke")
    printed = align("run", *(f"stages.{stage}.data.source=path:{files[which]}" for stage, which in reads.items()))
    assert {stage: entry["state"] for stage, entry in align.stages().items()} == dict.fromkeys(reads, "done"), printed
    base = load_file(model / "model.safetensors")
    for stage in reads:
        trained = load_file(align.artifact(stage) / "model/model.safetensors")
        shared = base.keys() & trained.keys()
        assert any(not torch.equal(base[name], trained[name]) for name in shared), stage
