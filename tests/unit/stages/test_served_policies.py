"""Policies behind an engine: which share a server, and what a server at a url cannot give."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from alignment.config.adapter import AdapterConfig, Chain
from alignment.config.sampling_engine import Engine, SamplingConfig
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.engines.completions import Asked, EngineAnswer, Generation
from alignment.evaluation.arms import sequence_logprobs
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling
from alignment.stages.shared import served_policies
from alignment.stages.shared.served_policies import ServedPolicies, served_answer_and_score
from alignment.training.context import StageContext
from tests.chained import LORA, Chained
from tests.engine_server import engine_server

STACK = AdapterConfig(rank=4, chain=Chain.stack)
GENERATION = Generation(max_new_tokens=4, temperature=1.0, end_ids=[2])
PROMPTS = [[5, 9, 40], [7, 120]]


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> Chained:
    """A run with an adapter on its base, and one on the merged weights of both."""
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


def test_merged_weights_are_refused_at_a_url(chained: Chained) -> None:
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        with pytest.raises(ConfigError, match="one set of weights, but this policy has different weights") as raised:
            policies.prepare(policy_of(chained, "dpo"), 10)
        assert raised.value.where.endswith(".sampling.url")
        assert engine.names == ["base"]


def test_more_positions_than_the_model_has_are_refused_before_a_server_is_used(chained: Chained) -> None:
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        with pytest.raises(
            ModelError, match="the model has 4096 positions; a prompt with its answer may need 5000"
        ) as raised:
            policies.prepare(policy_of(chained, "sft"), 5000)
        assert raised.value.where == str(chained.base)
        assert engine.calls == []


def answers_and_sums(
    policies: ServedPolicies, model: PreTrainedModel, temperature: float
) -> tuple[list[list[int]], list[list[float]]]:
    """The engine's answers to the prompts, and the sums of the model's own log-probabilities of them."""
    return served_answer_and_score(
        policies,
        model,
        PROMPTS,
        [[], []],
        max_new_tokens=4,
        end_ids=[2],
        with_own=True,
        progress=lambda _: None,
        sampling=Sampling(temperature=temperature, uniforms=torch.tensor([[0.1], [0.6]], dtype=torch.float64)),
    )


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_answers_at_any_temperature_are_known_as_the_policys_own(
    chained: Chained, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The engine's log-probabilities are those at the temperature; the ones that are reported are not."""
    monkeypatch.setattr(served_policies, "OTHER_WEIGHTS", 1e-3)
    policy = policy_of(chained, "sft")
    model = load_policy(policy, torch.float32)
    use_flat_attention(model)
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        policies.prepare(policy, 10)
        answers, sums = answers_and_sums(policies, model, temperature)
    assert [own for (own,) in sums] == pytest.approx(sequence_logprobs(model, PROMPTS, answers), abs=1e-5)


def test_other_weights_are_noticed_by_a_part_of_the_answers_at_their_temperature(
    chained: Chained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_policies, "OTHER_WEIGHTS", 1e-3)
    monkeypatch.setattr(served_policies, "_CHECKED", 1)
    model = load_policy(policy_of(chained, "sft"), torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    use_flat_attention(model)
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        policies.prepare(policy_of(chained, "sft"), 10)
        with pytest.raises(StageError, match="so it has other weights"):
            answers_and_sums(policies, model, 0.3)


def test_a_server_with_other_weights_is_found_by_their_log_probabilities(chained: Chained) -> None:
    policy = policy_of(chained, "sft")
    with engine_server(chained.base) as engine, served(chained, engine.url) as policies:
        policies.prepare(policy, 10)
        answers = [
            answers[0]
            for answers in policies.answers([Asked(prompt=prompt, answers=1, seed=1) for prompt in PROMPTS], GENERATION)
        ]
        policies.refuse_other_weights(answers, [sum(answer.logprobs) for answer in answers])
        far = [EngineAnswer(ids=answer.ids, logprobs=[value - 1.0 for value in answer.logprobs]) for answer in answers]
        with pytest.raises(StageError, match=r"differ from the policy's by 1\.00 nats per token"):
            policies.refuse_other_weights(far, [sum(answer.logprobs) for answer in answers])
