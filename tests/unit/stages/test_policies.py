"""Policies that stages ask: one after another in memory, behind an engine, and what is kept of their answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignment.config.launch import Engine, SamplingConfig
from alignment.core.artifacts import write_json
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.engines.completions import Asked, Generation
from alignment.evaluation.arms import sequence_logprobs
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling
from alignment.stages.evaluate import caches
from alignment.stages.evaluate.caches import CachedAnswers
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.shared import policies
from alignment.stages.shared import policy_logprobs as own_logprobs
from alignment.stages.shared.policies import Policies, ServedPolicies, served_answer_and_score
from alignment.stages.shared.policy_logprobs import PolicyRows, policy_logprobs
from alignment.training.context import StageContext
from tests.chained import LORA, Chained
from tests.engine_server import engine_server
from tests.in_memory import others_at_each_load, without_collections
from tests.oracles import logprobs as oracle
from tests.oracles.close import close
from tests.tiny import save_tiny_model, tiny_spec

ROW_PROMPTS = [[5, 6, 7], [5, 6, 7], [9] * 20, [8, 3], [8, 3, 4, 4]]
ROW_ANSWERS = [[11, 12], [13], [14, 15, 16], [17], [18, 19]]


def slow(model: Any, prompt: list[int], answer: list[int]) -> float:
    total, ids = 0.0, list(prompt)
    for token in answer:
        total += oracle.log_softmax(model(torch.tensor([ids])).logits[0, -1].tolist())[token]
        ids.append(token)
    return total


@pytest.mark.parametrize("tokens", [8, 4096])
def test_each_row_has_the_log_probability_of_its_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(own_logprobs, "TOKENS", tokens)
    folders = {name: save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "other"))}
    context = StageContext(spec=tiny_spec(tmp_path, EvaluateConfig(arms=["base"])), rank=0, world_size=1)
    asked = {
        name: PolicyRows(
            policy=Lineage(source=f"path:{name}", base=folder, adapters=()),
            prompts=ROW_PROMPTS[: 5 - number],
            answers=ROW_ANSWERS[: 5 - number],
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
            prompts=ROW_PROMPTS,
            answers=ROW_ANSWERS,
        )
        for name in ("first", "second", "third")
    }
    others = others_at_each_load(monkeypatch)
    with without_collections():
        policy_logprobs(context, "scoring", Policies(context), asked)
    assert others == [0, 0, 0]


GENERATION = Generation(max_new_tokens=4, temperature=1.0, end_ids=[2])
PROMPTS = [[5, 9, 40], [7, 120]]


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    chained = Chained(tmp_path_factory.mktemp("served"))
    chained.run("sft", LORA)
    chained.run("dpo", LORA, init="sft")
    return chained


def policy_of(chained: Chained, stage: str) -> Lineage:
    spec = chained.spec("dpo", LORA, init=stage)
    return lineage(spec, spec.inputs["init"])


def served(chained: Chained, url: str) -> ServedPolicies:
    context = StageContext(spec=chained.spec("dpo", LORA, init="sft"), rank=0, world_size=1)
    return ServedPolicies(SamplingConfig(engine=Engine.vllm, url=url), context)


def test_an_adapter_on_the_base_is_answered_for_at_a_url(chained: Chained) -> None:
    policy = policy_of(chained, "sft")
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        policies.prepare(policy, 10)
        policies.answers([Asked(prompt=PROMPTS[0], answers=1, seed=1)], GENERATION)
        assert len(engine.names) == 2
        policies.prepare(policy, 2000)  # the server's own length is the user's choice
        assert len(engine.names) == 2


def test_what_a_url_cannot_give_is_refused_before_a_server_is_used(chained: Chained) -> None:
    """Merged weights, and more positions than the model has."""
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        with pytest.raises(ModelError, match="4096 positions; a prompt with its answer may need 5000") as too_long:
            policies.prepare(policy_of(chained, "sft"), 5000)
        assert too_long.value.where == str(chained.base)
        assert engine.calls == []
        with pytest.raises(ConfigError, match="this policy has different weights") as merged:
            policies.prepare(policy_of(chained, "dpo"), 10)
        assert merged.value.where.endswith(".sampling.url")
        assert engine.names == ["base"]


def sums_of_answers(
    chained: Chained, temperature: float, *, scale: float = 1.0
) -> tuple[PreTrainedModel, list[list[int]], list[float]]:
    """The policy with its head's weights scaled, the engine's answers to the prompts, and the policy's own sums of
    their log-probabilities."""
    policy = policy_of(chained, "sft")
    model = load_policy(policy, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    use_flat_attention(model)
    uniforms = torch.tensor([[0.1], [0.6]], dtype=torch.float64)
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        policies.prepare(policy, 10)
        answers, sums = served_answer_and_score(
            policies,
            model,
            PROMPTS,
            [[], []],
            max_new_tokens=4,
            end_ids=[2],
            with_own=True,
            progress=lambda _: None,
            sampling=Sampling(temperature=temperature, uniforms=uniforms),
        )
    return model, answers, [own for (own,) in sums]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_answers_at_any_temperature_are_known_as_the_policys_own(
    chained: Chained, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The engine's log-probabilities are those at the temperature; the ones that are reported are not."""
    monkeypatch.setattr(policies, "OTHER_WEIGHTS", 1e-3)
    model, answers, sums = sums_of_answers(chained, temperature)
    assert sums == pytest.approx(sequence_logprobs(model, PROMPTS, answers), abs=1e-5)


def test_other_weights_are_noticed_by_a_part_of_the_answers_at_their_temperature(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "OTHER_WEIGHTS", 1e-3)
    monkeypatch.setattr(policies, "_CHECKED", 1)
    with pytest.raises(StageError, match="so it has other weights"):
        sums_of_answers(chained, 0.3, scale=3.0)


ANSWERS = CachedAnswers(ids=[[1, 2]], logprobs=None, references=[None], seconds=1.0)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_json(file, {"a": 1}),
        lambda file: caches.write_answers(file, ANSWERS),
    ],
    ids=["json", "answers"],
)
def test_processes_of_the_same_number_on_two_machines_may_write_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """The other one writes all of it while this one is about to rename its own."""
    file, rename = tmp_path / "kept.json", os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", rename)
        write(file)
        rename(source, target)

    monkeypatch.setattr(os, "replace", late)
    write(file)
    assert list(tmp_path.iterdir()) == [file]
