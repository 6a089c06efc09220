"""What a stage compares at its first step is equal in bfloat16, too, on a model with biases and rows of all lengths.

There a log-probability depends on the rows that share its micro-batch. So policy and reference, and new and old policy,
have to be computed in the same ones.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind, Critic, Dtype
from alignment.config.optim import OptimConfig
from alignment.config.scoring import ScorerConfig
from alignment.config.stage import StageConfig
from alignment.core.errors import StageError
from alignment.models.forward.answers import unwrapped
from alignment.stages.dpo import run as dpo
from alignment.stages.kto import run as kto
from alignment.stages.ppo.config import Advantage, PpoOptimConfig
from tests.chained import DATA, FULL, LORA, QLORA, Chained, config_of
from tests.tiny import tiny_model

WITHOUT_MASTERS = AdapterConfig(kind=AdapterKind.full, master_weights=False)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}


@pytest.fixture
def chained(tmp_path: Path) -> Chained:
    return Chained(tmp_path, dtype=Dtype.bfloat16, architecture="qwen2", **SIZES)


def settings(rows: int = 24) -> dict[str, Any]:
    data = DataConfig(source=str(DATA), limit=rows)
    optim = OptimConfig(lr=1e-3, batch_size=8, warmup_ratio=0.0, micro_batch_tokens=700)
    return {"data": data, "optim": optim}


@pytest.mark.parametrize(
    ("kind", "adapter", "init", "precompute"),
    [
        ("dpo", LORA, "sft", False),
        ("dpo", FULL, "base", False),
        ("dpo", WITHOUT_MASTERS, "base", False),
        ("dpo", QLORA, "base", True),
        ("kto", QLORA, "base", False),
        ("kto", LORA, "sft", True),
    ],
)
def test_policy_and_reference_are_equal_at_the_start(
    chained: Chained, kind: str, adapter: AdapterConfig, init: str, *, precompute: bool
) -> None:
    """A precomputed reference is of other micro-batches than those that are learned from, so it is only close."""
    if init == "sft":
        chained.run("sft", adapter)
    config = config_of(kind, adapter, precompute_reference=precompute, **settings(rows=17))
    first = chained.run(kind, adapter, init=init, config=config)[0]
    for name in ("rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0.0, abs=0.2 if precompute else 1e-9)
    if kind == "kto":
        assert first["kl"] == pytest.approx(0.0, abs=1.0 if precompute else 1e-6)


@pytest.mark.parametrize(
    ("kind", "wrong", "adapter", "precompute"),
    [
        ("dpo", "another base", FULL, False),
        ("dpo", "not merged", LORA, True),
        ("dpo", "merged twice", LORA, True),
        ("kto", "not merged", FULL, False),
        ("kto", "not merged", LORA, True),
    ],
)
def test_a_reference_that_is_not_the_start_is_refused(
    chained: Chained,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    adapter: AdapterConfig,
    wrong: str,
    *,
    precompute: bool,
) -> None:
    """After the reference was made, the policy becomes one that differs by SFT's few steps, or by its base."""
    chained.run("sft", LORA)
    policy, base = chained.policy("sft").state_dict(), AutoModelForCausalLM.from_pretrained(chained.base).state_dict()
    other = tiny_model("qwen2", seed=1, vocab_size=len(base["lm_head.weight"]), **SIZES).state_dict()
    module = {"dpo": dpo, "kto": kto}[kind]
    check = module.check_start

    def of_another(trainer: Any) -> Any:
        for name, weight in unwrapped(trainer.model).named_parameters():
            own = name.replace(".base_layer", "")
            if own in policy:
                step = {"merged twice": 1.0, "not merged": -1.0}.get(wrong)
                weight.data.copy_(other[own] if step is None else policy[own] + step * (policy[own] - base[own]))
        return check(trainer)

    monkeypatch.setattr(module, "check_start", of_another)
    config = config_of(kind, adapter, precompute_reference=precompute, **settings())
    with pytest.raises(StageError, match="the reference is not the starting policy"):
        chained.run(kind, adapter, init="sft", config=config)


def test_four_bits_on_a_base_with_biases_learn_the_same_in_any_micro_batches(chained: Chained) -> None:
    kind, first = "sft", []
    for tokens in (300, 5000):
        optim = replace(settings()["optim"], micro_batch_tokens=tokens)
        config = config_of(kind, QLORA, **settings() | {"optim": optim})
        first.append(chained.run(kind, QLORA, config=config)[0])
        shutil.rmtree(chained.inputs[kind].path)
    for name in ("loss", "grad_norm"):
        assert first[0][name] == pytest.approx(first[1][name], rel=0.02)


@pytest.mark.parametrize(
    ("adapter", "method"),
    [
        (LORA, Advantage.gae),
        (LORA, Advantage.rloo),
        (QLORA, Advantage.gae),
        (FULL, Advantage.gae),
        (WITHOUT_MASTERS, Advantage.gae),
    ],
)
def test_ratios_start_at_one(chained: Chained, adapter: AdapterConfig, method: Advantage) -> None:
    (figures,) = chained.run("ppo", adapter, config=rl_config(adapter, method))
    assert figures["val/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert figures["val/ratio_max"] == pytest.approx(1.0, abs=1e-3)
    assert figures["policy/clipfrac"] == 0.0


def rl_config(adapter: AdapterConfig, method: Advantage) -> StageConfig:
    return config_of(
        "ppo",
        adapter,
        advantage=method,
        critic=Critic.shared if method is Advantage.gae else Critic.none,
        reward=None,
        completions_per_prompt=2,
        updates=1,
        ppo_epochs=1,
        num_minibatches=1 if adapter.kind is AdapterKind.full else 2,  # a step rounds whole weights otherwise
        max_new_tokens=24,
        max_prompt_length=4096,
        data=DataConfig(source=str(DATA), limit=24),
        optim=PpoOptimConfig(lr=1e-9, batch_size=16, micro_batch_tokens=700),
        scorers=[ScorerConfig(source="length", target=8)],
    )
