"""Recipes scaled down: those for GPUs with a tiny model and a few of the shipped rows in place of theirs, all else as
written; and every one under the smoke profile."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.artifacts import verify
from alignment.config.store import recipe_names
from alignment.pipeline.compose import compose
from tests.e2e.conftest import Align, environment
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


def _told(recipe: str, folder: Path) -> list[str]:
    """What a smoke run of a recipe is told: a model as tiny as can be, and rows like those that it was made for."""
    architecture, row, reads = PUBLIC.get(recipe, ("llama", None, {}))
    model = folder / architecture
    if not model.exists():
        tokenizer = pythia_tokenizer() if architecture == "gpt_neox" else None
        save_tiny_model(model, architecture=architecture, tokenizer=tokenizer)
    told = [f"output={folder / recipe}", f"model.source=path:{model}"]
    for stage, which in reads.items():
        file = folder / f"{recipe}-{stage}.jsonl"
        file.write_text("".join(f"{json.dumps(row(number)[which])}\n" for number in range(1, 11)))
        told.append(f"stages.{stage}.data.source=path:{file}")
    return told


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every shipped recipe ran under the smoke profile, each below its own name."""
    folder = tmp_path_factory.mktemp("smoke")
    lines = [["run", recipe, "profile=smoke", *_told(recipe, folder)] for recipe in recipe_names()]
    program = [sys.executable, "-m", "tests.e2e.forked"]
    done = subprocess.run(
        program, input=json.dumps(lines), capture_output=True, text=True, timeout=900, env=environment(), check=False
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(lines), f"{done.stdout}{done.stderr}"
    return folder


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_runs_as_smoke_and_says_so(smoke: Path, recipe: str) -> None:
    run = json.loads((smoke / recipe / f"runs/{recipe}-smoke/run.json").read_text())
    assert (run["name"], run["state"]) == (f"{recipe}-smoke", "done")
    assert run["stages"].keys() == compose(recipe, []).tree["stages"].keys()
    assert {stage["state"] for stage in run["stages"].values()} == {"done"}
    if "report" in run["stages"]:
        assert f"<title>{recipe}-smoke" in (smoke / recipe / f"runs/{recipe}-smoke/report.html").read_text()


@pytest.mark.parametrize("recipe", PUBLIC)
def test_all_weights_learn_from_rows_like_the_public_ones(smoke: Path, recipe: str) -> None:
    architecture, _, reads = PUBLIC[recipe]
    base = load_file(smoke / architecture / "model.safetensors")
    for stage in reads:
        (artifact,) = (smoke / recipe / "artifacts").glob(f"{stage}-*")
        trained = load_file(artifact / "model/model.safetensors")
        assert any(not torch.equal(base[name], trained[name]) for name in base.keys() & trained.keys()), stage
