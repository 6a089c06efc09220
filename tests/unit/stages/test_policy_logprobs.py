"""Rows that several policies read together have the log-probabilities of a slow forward, whatever the micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignment.models.assembly.load import Lineage
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.shared import policy_logprobs as module
from alignment.stages.shared.arm_policies import Policies
from alignment.stages.shared.policy_logprobs import PolicyRows, policy_logprobs
from alignment.training.context import StageContext
from tests.in_memory import others_at_each_load, without_collections
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.tiny import save_tiny_model, tiny_spec

PROMPTS = [[5, 6, 7], [5, 6, 7], [9] * 20, [8, 3], [8, 3, 4, 4]]
ANSWERS = [[11, 12], [13], [14, 15, 16], [17], [18, 19]]


def slow(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Sum of log p(token | all before it), one forward a token."""
    total, ids = 0.0, list(prompt)
    for token in answer:
        total += oracle.log_softmax(model(torch.tensor([ids])).logits[0, -1].tolist())[token]
        ids.append(token)
    return total


@pytest.mark.parametrize("tokens", [8, 30, 4096])
def test_each_row_has_the_log_probability_of_its_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(module, "TOKENS", tokens)
    folders = {name: save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "other"))}
    context = StageContext(spec=tiny_spec(tmp_path, EvaluateConfig(arms=["base"])), rank=0, world_size=1)
    asked = {
        name: PolicyRows(
            policy=Lineage(source=f"path:{name}", base=folder, adapters=()),
            prompts=PROMPTS[: 5 - number],
            answers=ANSWERS[: 5 - number],
        )
        for number, (name, folder) in enumerate(folders.items())
    }
    logprobs = policy_logprobs(context, "scoring", Policies(context), asked)
    assert list(logprobs) == ["base", "other"]
    for name, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = zip(asked[name].prompts, asked[name].answers, strict=True)
        close(logprobs[name], [slow(model, *row) for row in rows])


def test_one_policy_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(spec=tiny_spec(tmp_path, EvaluateConfig(arms=["base"])), rank=0, world_size=1)
    asked = {
        name: PolicyRows(
            policy=Lineage(source=f"path:{name}", base=save_tiny_model(tmp_path / name), adapters=()),
            prompts=PROMPTS,
            answers=ANSWERS,
        )
        for name in ("first", "second", "third")
    }
    others = others_at_each_load(monkeypatch)
    with without_collections():
        policy_logprobs(context, "scoring", Policies(context), asked)
    assert others == [0, 0, 0]
