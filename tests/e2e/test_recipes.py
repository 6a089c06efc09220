"""Recipes under the smoke profile, on tiny models: those for GPUs, and others; and the bundled model in bfloat16."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.core.artifacts import verify
from alignment.pipeline.plan.compose import compose
from alignment.pipeline.sources import bundled_model
from tests.e2e.conftest import Align
from tests.e2e.forked import Forked
from tests.tiny import pythia_tokenizer, save_tiny_model

SMOKED = (
    "llama_8b_rlhf_qlora",
    "rlhf_8b_8gpu",
    "tldr_1b_ppo",
    "tulu3_8b_sft_dpo",
    "grpo_math",
    "dpo_7b_qlora_24gb",
    "reward_card",
    "iterative_dpo",
    "kto",
    "draft",
)
"""What differs in kind: four bits, GPT-NeoX, full training, an engine, a verifier, rows of public data sets and of the
user's, and stages that others lack."""


def _tulu_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in allenai/tulu-3-sft-mixture and allenai/llama-3.1-tulu-3-8b-preference-mixture."""
    asks = {"role": "user", "content": f"Write a constraint-following poem about the number {number}. " * 3}
    good, bad = ({"role": "assistant", "content": f"{word} {number}, in rows of {number}."} for word in ("Number", "I"))
    origin = {"id": f"row_{number}", "source": "ai2-adapt-dev/personas"}
    pair = {"prompt": asks["content"], "chosen": [asks, good], "rejected": [asks, bad]}
    return {**origin, "messages": [asks, good]}, {**origin, **pair}


def _tldr_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    post = f"SUBREDDIT: r/dogs\n\nTITLE: Dog number {number}\n\nPOST: {'It barks. ' * number}\n\nTL;DR:"
    good, bad = f" Dog {number} barks, what to do?", f" I have {number} dogs."
    return {"prompt": post, "completion": good}, {"prompt": post, "chosen": good, "rejected": bad}


def _gsm8k_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """As in openai/gsm8k: a problem to learn from, and one of the evaluation."""
    learned, held_out = (f"Ada has {number} {noun} and buys 2 more. How many?" for noun in ("apples", "books"))
    solution = f"{number} + 2 = <<{number}+2={number + 2}>>{number + 2}.\n#### {number + 2}"
    return {"question": learned, "answer": solution}, {"question": held_out, "answer": solution}


def _own_row(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    answers = {"chosen": f"It opens at {number}.", "rejected": "No idea."}
    return {"prompt": f"When does shop {number} open?", **answers}, {"prompt": f"Is bar {number} open?", **answers}


ROWS = {
    "tulu3_8b_sft_dpo": ("llama", _tulu_row, {"sft": 0, "dpo": 1}),
    "tldr_1b_ppo": ("gpt_neox", _tldr_row, {"sft": 0, "reward": 1, "ppo": 0}),
    "grpo_math": ("qwen2", _gsm8k_row, {"ppo": 0, "evaluate": 1}),
    "dpo_7b_qlora_24gb": ("qwen2", _own_row, {"dpo": 0, "evaluate": 1}),
}
"""The recipe's architecture, its two data sets row by row, and which of them each stage reads."""
OF_ALL_WEIGHTS = ("tulu3_8b_sft_dpo", "tldr_1b_ppo")


def _overrides(recipe: str, folder: Path) -> list[str]:
    """What a smoke run of a recipe is told: a model as tiny as can be, and rows like those that it was made for."""
    architecture, row, reads = ROWS.get(recipe, ("llama", None, {}))
    model = folder / architecture
    if not model.exists():
        tokenizer = pythia_tokenizer() if architecture == "gpt_neox" else None
        save_tiny_model(model, architecture=architecture, tokenizer=tokenizer)
    overrides = [f"output={folder / recipe}", f"model.source=path:{model}"]
    if recipe == "draft":
        overrides.append("stages.draft.layers=1")  # the model has two
    for stage, which in reads.items():
        file = folder / f"{recipe}-{stage}.jsonl"
        file.write_text("".join(f"{json.dumps(row(number)[which])}\n" for number in range(1, 11)))
        overrides.append(f"stages.{stage}.data.source=path:{file}")
    return overrides


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> Path:
    """A folder in which recipes ran under the smoke profile, each below its own name."""
    folder = tmp_path_factory.mktemp("smoke")
    for recipe in SMOKED:
        code, printed = forked.run(["run", recipe, "profile=smoke", *_overrides(recipe, folder)])
        assert code == 0, printed
    return folder


@pytest.mark.parametrize("recipe", SMOKED)
def test_a_recipe_runs_as_smoke_and_says_so(smoke: Path, recipe: str) -> None:
    run = json.loads((smoke / recipe / f"runs/{recipe}-smoke/run.json").read_text())
    assert (run["name"], run["state"]) == (f"{recipe}-smoke", "done")
    assert run["stages"].keys() == compose(recipe, []).tree["stages"].keys()
    assert {stage["state"] for stage in run["stages"].values()} == {"done"}
    if "report" in run["stages"]:
        assert f"<title>{recipe}-smoke" in (smoke / recipe / f"runs/{recipe}-smoke/report.html").read_text()


@pytest.mark.parametrize("recipe", OF_ALL_WEIGHTS)
def test_all_weights_learn_from_rows_like_the_public_ones(smoke: Path, recipe: str) -> None:
    architecture, _, reads = ROWS[recipe]
    base = load_file(smoke / architecture / "model.safetensors")
    for stage in reads:
        (artifact,) = (smoke / recipe / "artifacts").glob(f"{stage}-*")
        trained = load_file(artifact / "model/model.safetensors")
        assert any(not torch.equal(base[name], trained[name]) for name in base.keys() & trained.keys()), stage


def test_answers_are_checked_by_the_number_and_by_the_box_around_it(smoke: Path) -> None:
    recipe = "grpo_math"
    (evaluation,) = (smoke / recipe / "artifacts").glob("evaluate-*/evaluation.json")
    metrics = {"correct", "one_of_four", "voted", "format"}
    assert all(arm["metrics"].keys() == metrics for arm in json.loads(evaluation.read_text())["arms"])
    stage = compose(recipe, []).tree["stages"]["ppo"]
    (pattern,) = (scorer["pattern"] for scorer in stage["scorers"] if "pattern" in scorer)
    assert re.search(pattern, r"So she paid \(\boxed{1,080.50}\) dollars.")
    assert not re.search(pattern, r"boxed{18}, \boxed{}, \boxed{x}, #### 18")


def test_adapters_on_four_bits_are_stacked(smoke: Path) -> None:
    recipe = "llama_8b_rlhf_qlora"
    for name, stage in json.loads((smoke / recipe / f"runs/{recipe}-smoke/run.json").read_text())["stages"].items():
        stood = verify(Path(stage["artifact"]), content=True).adapters_stood
        assert all(application["nf4"] for application in stood.values()), name
        assert [application["merged"] for application in stood.values()] == [True, *[False] * (len(stood) - 1)]


def test_a_changed_second_round_runs_again_alone_and_learns_from_the_first_one_s_answers(
    smoke: Path, forked: Forked
) -> None:
    recipe = "iterative_dpo"
    changed = ("profile=smoke", "name=changed", "stages.sample_2.temperature=0.7")
    code, printed = forked.run(["run", recipe, *changed, *_overrides(recipe, smoke)])
    assert code == 0, printed
    before, after = (
        json.loads((smoke / recipe / f"runs/{name}-smoke/run.json").read_text())["stages"]
        for name in (recipe, "changed")
    )
    done = [name for name, stage in after.items() if stage["state"] == "done"]
    assert done == ["sample_2", "dpo_2", "evaluate", "report"]
    sampled = Path(after["sample_2"]["artifact"])
    first, second = (verify(Path(stages["artifact"]), content=True) for stages in (before["dpo_1"], after["dpo_2"]))
    policies = {json.loads(line)["policy"] for line in (sampled / "samples.jsonl").read_text().splitlines()}
    assert policies == {first.fingerprint}
    assert second.inputs["init"] == first.fingerprint, "the first round's policy is the reference"
    assert second.inputs["data.source"] == verify(sampled, content=True).fingerprint


MODEL = bundled_model.lookup("smollm2-135m")


@pytest.mark.slow
@pytest.mark.skipif(
    not bundled_model.is_ready(MODEL), reason="no bundled model on this machine; `make model` fetches it"
)
def test_the_bundled_model_learns_in_bfloat16(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    """One stage as the quickstart trains it."""
    rows = tmp_path / "one_short_row.jsonl"  # a row of the quickstart takes two minutes on a CPU without bfloat16
    turns = [{"role": "user", "content": "When is it open?"}, {"role": "assistant", "content": "The shop opens at 9."}]
    rows.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    align = new_forked()
    others = [f"~stages.{stage}" for stage in ("reward", "dpo", "ppo", "evaluate", "report")]
    optim = "{batch_size: 1, max_steps: 3, lr: 2e-3, schedule: constant, warmup_ratio: 0.0, micro_batch_tokens: 512}"
    overrides = (f"model.source=bundled:{MODEL.name}", "model.dtype=bfloat16", f"stages.sft.optim={optim}")
    align("run", *others, *overrides, f"stages.sft.data.source=path:{rows}")
    artifact = align.artifact("sft")
    base = verify(artifact, content=True).identity["base"]
    assert base == {"content": f"gguf-sha256:{MODEL.sha256}", "dtype": "bfloat16"}
    losses = [line["loss"] for line in align.rows("sft")]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 0.05, "the same row three times"
    factors = load_file(artifact / "adapters/0-sft/adapter_model.safetensors")
    assert {held.dtype for held in factors.values()} == {torch.float32}, "factors have masters, products are bfloat16"
    model = AutoModelForCausalLM.from_pretrained(bundled_model.folder(MODEL), dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    assert PeftModel.from_pretrained(model, artifact / "adapters/0-sft").active_adapter == "default"
