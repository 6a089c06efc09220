"""Chains of stages under all kinds of adapters: each starts where the one before it ended, and its reference there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment import worker
from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Dtype, ModelConfig
from alignment.core.artifacts import MANIFEST, read_manifest
from alignment.core.errors import ModelError
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.roles import load_start
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.rows import stream
from alignment.stages.registry import kind_of
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from tests.chained import DATA, DORA, FULL, LORA, PREFIX, QLORA, SAME_PREFIX, Chained, config_of
from tests.measuring import Measuring
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE, publish_tiny, tiny_spec

IDS = torch.tensor([[5, 6, 7, 8, 2]])


def lora(chain: Chain) -> AdapterConfig:
    return AdapterConfig(rank=4, chain=chain)


@pytest.fixture
def chained(tmp_path: Path) -> Chained:
    return Chained(tmp_path)


def moved(chained: Chained, kind: str, since: str) -> float:
    states = []
    for name in (kind, since):
        model = chained.policy(name)
        use_flat_attention(model)
        with torch.no_grad():
            states.append(trunk_states(model.base_model, stream(IDS.tolist(), torch.device("cpu"))))
    return float((states[0] - states[1]).abs().max())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FULL, LORA),
        (LORA, lora(Chain.stack)),
        (DORA, AdapterConfig(kind=AdapterKind.dora, rank=4, chain=CONTINUE)),
        (QLORA, AdapterConfig(kind=AdapterKind.qlora, rank=4, chain=CONTINUE)),
    ],
    ids=lambda adapter: f"{adapter.kind.value}-{adapter.chain.value}",
)
def test_dpo_starts_at_ln_2_from_whatever_sft_left(
    chained: Chained, first: AdapterConfig, second: AdapterConfig
) -> None:
    chained.run("sft", first)
    lines = chained.run("dpo", second, init="sft")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert lines[-1]["loss"] < LN2 - 1e-4, "it learned"
    assert moved(chained, "dpo", "sft") > 1e-3


@pytest.mark.parametrize(
    ("sft", "later"),
    [(QLORA, QLORA), (LORA, lora(Chain.stack)), (LORA, lora(CONTINUE)), (FULL, LORA), (PREFIX, SAME_PREFIX)],
    ids=lambda adapter: f"{adapter.kind.value}-{adapter.chain.value}",
)
def test_ppo_starts_at_no_kl_with_one_base(chained: Chained, sft: AdapterConfig, later: AdapterConfig) -> None:
    chained.run("sft", sft)
    chained.run("reward", later, init="sft")
    lines = chained.run("ppo", later, init="sft")
    assert abs(lines[0]["objective/kl"]) < 1e-6
    assert lines[1]["objective/kl"] != 0.0
    copies = lines[0]["memory/base_copies"]
    assert copies > 3 if later.kind is AdapterKind.full else copies == pytest.approx(1.0, abs=0.02)
    assert moved(chained, "ppo", "sft") > 1e-4


LN2 = math.log(2)
QWEN = {"architecture": "qwen2"}  # whose queries, keys and values have biases


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, AdapterConfig(rank=4, alpha=8.0, chain=CONTINUE)),
        ({"use_dora": True}, lora(Chain.merge)),
        ({"use_rslora": True, "target_modules": ["up_proj"]}, lora(Chain.stack)),
        ({"modules_to_save": ["lm_head"]}, lora(Chain.merge)),
    ],
    ids=["continue", "dora", "rslora", "head"],
)
def test_a_stage_starts_from_an_adapter_that_peft_saved(
    tmp_path: Path, settings: dict[str, Any], own: AdapterConfig
) -> None:
    chained = Chained(tmp_path, **QWEN)
    folder = chained.adapter_from_outside(**settings)
    start = lineage(chained.spec("dpo", own, init="outside"), chained.inputs["outside"])
    policy = load_start(start, own, Dtype.float32, task=TaskType.CAUSAL_LM, device=torch.device("cpu"))
    with torch.no_grad():
        expected = plain_policy(chained.base, [folder], [])(input_ids=IDS).logits
        close(policy(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    lines = chained.run("dpo", own, init="outside")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    artifact = chained.inputs["dpo"].path
    manifest = read_manifest(artifact)
    assert manifest.base["source"] == BASE_SOURCE
    below = [] if own.chain is CONTINUE else ["adapters/0-outside"]
    assert manifest.adapters == [*below, f"adapters/{len(below)}-dpo"]
    for adapter in manifest.adapters:
        assert sorted(file.name for file in (artifact / adapter).iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    modules = json.loads((artifact / adapter / ADAPTER_CONFIG).read_text())["target_modules"]
    assert modules == sorted(modules), "equal runs leave equal bytes"
    merged = [artifact / name for name in below if own.chain is Chain.merge]
    beside = [artifact / name for name in manifest.adapters if artifact / name not in merged]
    answers = [
        model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False, use_cache=True).tolist()
        for model in (chained.policy("dpo"), plain_policy(chained.base, beside, merged))
    ]
    assert answers[0] == answers[1]


def plain_policy(base: Path, beside: list[Path], merged: list[Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(str(base))
    for folder in merged:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    policy = PeftModel.from_pretrained(model, str(beside[0]), adapter_name="0")
    for number, folder in enumerate(beside[1:], 1):
        policy.load_adapter(str(folder), str(number))
    policy.base_model.set_adapter([str(number) for number in range(len(beside))])
    return policy.eval()


def test_an_adapter_from_outside_is_merged_in_bfloat16_as_peft_merges_it(tmp_path: Path) -> None:
    chained = Chained(tmp_path, **QWEN)
    folder = chained.adapter_from_outside(torch.bfloat16)
    spec = chained.spec("dpo", LORA, init="outside", model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16))
    ours = load_policy(lineage(spec, chained.inputs["outside"]), torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(str(chained.base), dtype=torch.bfloat16)
    by_peft = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, by_peft(input_ids=IDS).logits)
    lines = chained.run("dpo", LORA, init="outside", model=spec.model)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"chat_template": "{{ messages }}"}, "chat template"), ({"added": "<new>"}, "vocabulary")],
    ids=["template", "token"],
)
def test_an_adapter_that_was_trained_on_other_tokens_is_refused(
    tmp_path: Path, changed: dict[str, str], message: str
) -> None:
    chained = Chained(tmp_path)
    folder = chained.adapter_from_outside()
    tokenizer = AutoTokenizer.from_pretrained(str(chained.base))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(str(folder))
    chained.run("dpo", LORA, init="outside")
    tokenizer.chat_template = changed.get("chat_template", tokenizer.chat_template)
    tokenizer.add_tokens([changed["added"]] if "added" in changed else [])
    tokenizer.save_pretrained(str(folder))
    with pytest.raises(ModelError, match=message):
        chained.run("kto", LORA, init="outside")


@pytest.mark.parametrize("kind", ["cpt", "sft", "reward", "dpo"])
def test_a_stage_reports_every_metric_that_its_kind_declares(chained: Chained, kind: str) -> None:
    chained.run(kind, LORA)
    manifest = read_manifest(chained.inputs[kind].path)
    config = config_of(kind, LORA)
    assert set(kind_of(config).metrics(config).names) <= manifest.metrics.keys()


@pytest.fixture(scope="module")
def measuring(tmp_path_factory: pytest.TempPathFactory) -> Measuring:
    """The manifests of ``sft`` and of its reward model name another chat template than that of their base."""
    measuring = Measuring(tmp_path_factory.mktemp("other"))
    start = Lineage(source=BASE_SOURCE, base=measuring.base, adapters=())
    spec = tiny_spec(measuring.folder / "made", SftConfig(), base_path=measuring.base)
    policy = publish_tiny(spec, load_policy(start, torch.float32), start)
    for published in (policy, measuring.reward):
        assert published.path is not None
        file = published.path / MANIFEST
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template_sha256": "0" * 64}))
    assert policy.path is not None
    measuring.policies = {"stage:sft": policy.path}
    return measuring


BASE = StageInput(ref="base", path=None)


@pytest.mark.parametrize(
    "slot", ["init", "ppo-reward", "reference", "evaluate-reward", "evaluate-arm", "forgetting-arm", "card"]
)
def test_a_model_of_another_chat_template_is_refused_in_every_slot_before_anything_is_computed(
    measuring: Measuring, slot: str
) -> None:
    """Scorers: tests/unit/rewards/test_build.py."""
    policy = StageInput(ref="stage:sft", path=measuring.policies["stage:sft"])
    match slot:
        case "init":
            spec = measuring.spec(slot, config_of("dpo", LORA), DATA / "preferences.jsonl", inputs={"init": policy})
        case "ppo-reward":
            inputs = {"init": BASE, "reward": measuring.reward}
            spec = measuring.spec(slot, config_of("ppo", LORA), DATA / "preferences.jsonl", inputs=inputs)
        case "forgetting-arm":
            spec = measuring.forgetting(slot, 4)
        case "card":
            spec = measuring.reward_card(slot, 2)
        case _:
            arms = {"stage:sft": policy} if slot == "evaluate-arm" else {"base": BASE}
            inputs = {"reference": policy if slot == "reference" else BASE}
            inputs |= {"reward": measuring.reward} if slot == "evaluate-reward" else {}
            spec = measuring.evaluate(slot, 1, arms=list(arms), metrics=[])
            spec = replace(spec, arms=arms, inputs=inputs)
    with pytest.raises(ModelError, match=f"has a different tokenizer or chat template than {BASE_SOURCE}"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert list((spec.work / "content").iterdir()) == []
