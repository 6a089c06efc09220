"""Policies and reward models come back from their artifacts as they were saved, on the base that they stand on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from transformers import AutoModelForSequenceClassification

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.model import Dtype, ModelConfig
from alignment.core.errors import ArtifactError, ModelError
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.job import StageInput
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import (
    Lineage,
    frozen_copy,
    lineage,
    load_policy,
    load_scalar,
    refuse_other_tokenizer,
    trained_dtype,
    weights_dtype,
)
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.forward.answers import scalar_scores, unwrapped
from alignment.models.forward.rows import stream
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.config import SftConfig
from tests.oracles.close import close
from tests.tiny import (
    ARCHITECTURES,
    BASE_SOURCE,
    liven,
    publish_tiny,
    save_tiny_model,
    tiny_model,
    tiny_reward,
    tiny_spec,
)
from tests.unit.models.conftest import relative

IDS = torch.tensor([[5, 6, 7, 8, 2]])
PAIRS = [[5, 6, 7, 2], [5, 6, 9, 9, 2], [8, 2], [8, 7, 2], [3, 3, 2], [3, 2], [11, 12, 13, 2], [11, 12, 2]]
CPU = torch.device("cpu")
LORA = AdapterConfig(rank=4)
FULL = AdapterConfig(kind=AdapterKind.full)
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    """A model folder as a run's base."""
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def _trained(start: Lineage, adapter: AdapterConfig) -> torch.nn.Module:
    """A policy that differs from what it started from."""
    model = add_adapter(load_policy(start, torch.float32), adapter, TaskType.CAUSAL_LM)
    liven(model)
    if adapter.kind is AdapterKind.full:
        model.model.norm.weight.data.mul_(1.5)
    return model


# ---- policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("first", [LORA, FULL], ids=["lora", "full"])
def test_a_policy_trained_in_two_stages_is_found_again(
    tmp_path: Path, base: Lineage, first: AdapterConfig, second: AdapterConfig
) -> None:
    sft_spec = tiny_spec(tmp_path, SftConfig(adapter=first))
    sft = _trained(base, first)
    sft_input = publish_tiny(sft_spec, sft, base)
    dpo_spec = tiny_spec(tmp_path, DpoConfig(adapter=second), inputs={"init": sft_input})
    restored = lineage(dpo_spec, sft_input)
    close(load_policy(restored, torch.float32)(IDS).logits, sft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    dpo = _trained(restored, second)
    dpo_input = publish_tiny(dpo_spec, dpo, restored)
    restored = lineage(dpo_spec, dpo_input)
    again = load_policy(restored, torch.float32)(IDS).logits
    close(again, dpo(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert relative(again, sft(input_ids=IDS).logits) > 1e-3, "the second stage should matter"


@pytest.mark.parametrize("first", [LORA, FULL], ids=["lora", "full"])
def test_every_weight_of_a_loaded_policy_can_be_trained(tmp_path: Path, base: Lineage, first: AdapterConfig) -> None:
    spec = tiny_spec(tmp_path, SftConfig(adapter=first))
    sft_input = publish_tiny(spec, _trained(base, first), base)
    policy = load_policy(lineage(spec, sft_input), torch.float32)
    assert [name for name, parameter in policy.named_parameters() if not parameter.requires_grad] == []


def test_an_artifact_never_needs_the_one_it_was_made_from(tmp_path: Path, base: Lineage) -> None:
    """Adapters below are copied; a trained base is as well."""
    for adapter in (LORA, FULL):
        folder = tmp_path / adapter.kind.value
        sft_input = publish_tiny(tiny_spec(folder, SftConfig(), base_path=base.base), _trained(base, adapter), base)
        spec = tiny_spec(folder, DpoConfig(), base_path=base.base, inputs={"init": sft_input})
        sft_lineage = lineage(spec, sft_input)
        dpo = _trained(sft_lineage, LORA)
        dpo_input = publish_tiny(spec, dpo, sft_lineage)
        sft_input.path.rename(folder / "elsewhere")
        assert not sft_input.path.exists()
        close(
            load_policy(lineage(spec, dpo_input), torch.float32)(IDS).logits,
            dpo(input_ids=IDS).logits,
            rtol=1e-4,
            atol=1e-4,
        )


def test_base_and_plain_folders_are_lineages_without_adapters(tmp_path: Path, base: Lineage) -> None:
    spec = tiny_spec(tmp_path, SftConfig())
    assert lineage(spec, StageInput(ref="base", path=None)) == base
    other = save_tiny_model(tmp_path / "other", seed=3)
    plain = lineage(spec, StageInput(ref=f"path:{other}", path=other))
    assert plain == Lineage(source=f"path:{other}", base=other, adapters=())


def test_an_artifact_of_another_base_is_refused(tmp_path: Path, base: Lineage) -> None:
    made_on = {"base": {"content": "one"}}
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig(), identity=made_on), _trained(base, LORA), base)
    spec = tiny_spec(tmp_path, DpoConfig(), identity={"base": {"content": "two"}})
    with pytest.raises(ModelError, match="stage:sft was trained on path:tiny, not on this run's base"):
        lineage(spec, sft_input)


def test_the_same_base_under_another_name_is_the_same_base(tmp_path: Path, base: Lineage) -> None:
    made_on = {"base": {"content": "one"}}
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig(), identity=made_on), _trained(base, LORA), base)
    model = ModelConfig(source="path:elsewhere", dtype=Dtype.float32)
    spec = tiny_spec(tmp_path, DpoConfig(), identity=made_on, model=model)
    assert lineage(spec, sft_input).base == base.base


def test_a_stage_that_started_from_another_folder_is_found_there(tmp_path: Path, base: Lineage) -> None:
    other = save_tiny_model(tmp_path / "other", seed=3)
    start = Lineage(source=f"path:{other}", base=other, adapters=())
    made_on = {"base": {"content": "one"}}
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig(), identity=made_on), _trained(start, LORA), start)
    spec = tiny_spec(tmp_path, DpoConfig(), identity=made_on)
    assert lineage(spec, sft_input).base == other


def test_a_model_file_that_was_cut_short_is_a_model_error(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_policy(Lineage(source="path:cut", base=folder, adapters=()), torch.float32)


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": False, "temperature": 0.9}, {}),
        ({"length_penalty": 0.8, "early_stopping": True}, {}),
        ({"pad_token_id": -1}, {}),
        ({"do_sample": True, "top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({}, {}),
    ],
)
def test_published_settings_of_generation_can_be_written_again(
    tmp_path: Path, base: Lineage, settings: dict[str, Any], written: dict[str, Any]
) -> None:
    """transformers reads all of these, but refuses to write some of them once a token has been set."""
    (base.base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    model = load_policy(base, torch.float32)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert content.pop("eos_token_id") == [2, 5]
    settings_written = {
        name: value for name, value in content.items() if name not in ("transformers_version", "_from_model_config")
    }
    assert {name: value for name, value in settings_written.items() if value not in (None, False)} == written


def test_settings_of_generation_that_cannot_be_corrected_are_left_alone(tmp_path: Path, base: Lineage) -> None:
    """Untouched, transformers writes them."""
    settings = {"do_sample": False, "temperature": 0.7, "output_hidden_states": True}
    (base.base / "generation_config.json").write_text(json.dumps(settings))
    load_policy(base, torch.float32).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/generation_config.json").read_text())["temperature"] == 0.7


def test_another_tokenizer_is_refused_by_name(tmp_path: Path, base: Lineage) -> None:
    other = save_tiny_model(tmp_path / "other", seed=3)
    tokenizer = load_tokenizer(other)
    spec, at = tiny_spec(tmp_path, DpoConfig()), StageInput(ref=f"path:{other}", path=other)
    refuse_other_tokenizer(spec, at, tokenizer)  # the same one passes
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(str(other))
    with pytest.raises(
        ModelError, match=f"^stages.dpo: path:{other} has a different tokenizer or chat template than {BASE_SOURCE}"
    ):
        refuse_other_tokenizer(spec, at, load_tokenizer(base.base))


def test_a_damaged_artifact_is_refused_before_anything_is_built_on_it(tmp_path: Path, base: Lineage) -> None:
    spec = tiny_spec(tmp_path, SftConfig())
    sft_input = publish_tiny(spec, _trained(base, LORA), base)
    file = next(spec.artifact.glob("adapters/*/adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="content differs from its manifest"):
        lineage(spec, sft_input)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model here"):
        load_policy(Lineage(source="path:x", base=tmp_path, adapters=()), torch.float32)


def test_a_folder_with_damaged_weights_is_refused(tmp_path: Path, base: Lineage) -> None:
    (base.base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        load_policy(base, torch.float32)


def test_a_policy_is_loaded_without_dropout_and_without_a_cache(base: Lineage) -> None:
    model = load_policy(base, torch.float32)
    assert not model.training
    assert model.config.use_cache is False


BARE = AdapterConfig(kind=AdapterKind.full, master_weights=False)


@pytest.mark.parametrize(
    ("adapter", "whole", "trained"),
    [
        (LORA, torch.bfloat16, torch.float32),
        (FULL, torch.float32, torch.float32),
        (BARE, torch.bfloat16, torch.bfloat16),
    ],
    ids=["lora", "full", "without masters"],
)
def test_trained_weights_are_float32_unless_they_have_no_masters(
    adapter: AdapterConfig, whole: torch.dtype, trained: torch.dtype
) -> None:
    assert weights_dtype(Dtype.bfloat16, adapter) is whole
    assert trained_dtype(Dtype.bfloat16, adapter) is trained
    assert weights_dtype(Dtype.float32, adapter) is trained_dtype(Dtype.float32, adapter) is torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_copy_says_the_same_in_less_memory(architecture: str) -> None:
    """Biases, heads that are tied and heads that are not."""
    model = tiny_model(architecture).eval()
    copied = frozen_copy(model, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert sum(p.nbytes for p in copied.parameters()) < 0.75 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copied(IDS).logits, model(IDS).logits)


# ---- reward models --------------------------------------------------------------------------------------------------


def _scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return scalar_scores(model, stream(PAIRS, torch.device("cpu")))


def test_a_fresh_head_is_drawn_with_the_published_width(base: Lineage) -> None:
    torch.manual_seed(0)
    model = load_scalar(base, torch.float32)
    drawn = torch.cat([load_scalar(base, torch.float32).score.weight.flatten() for _ in range(16)])
    assert model.score.bias is None
    assert model.score.weight.dtype == torch.float32
    assert model.score.weight.shape == (1, 32)
    assert abs(float(drawn.detach().std()) / 33**-0.5 - 1.0) < 0.1


@pytest.mark.parametrize("architecture", ["olmoe", "granitemoe"])
def test_an_architecture_without_scores_is_named_with_what_works_instead(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_model(tmp_path / "experts", architecture=architecture)
    with pytest.raises(ModelError, match=rf"^path:experts: .* the architecture '{architecture}', which") as caught:
        load_scalar(Lineage(source="path:experts", base=folder, adapters=()), torch.float32)
    assert "a base of another family" in caught.value.remedy
    assert "critic=shared or none" in caught.value.remedy


def test_an_architecture_whose_score_takes_more_than_a_layer_is_refused(
    base: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other layers would have no numbers."""
    plain = AutoModelForSequenceClassification.from_config

    def with_more(config: Any) -> Any:
        model = plain(config)
        model.dense = torch.nn.Linear(4, 4, bias=False)
        return model

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_config", with_more)
    with pytest.raises(ModelError, match=r"^path:tiny: Llama\w+ makes its score .* it also has dense\.weight\n"):
        load_scalar(base, torch.float32)


def test_the_trunk_of_a_reward_model_is_the_policys(tmp_path: Path, base: Lineage) -> None:
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig()), _trained(base, LORA), base)
    sft_lineage = lineage(tiny_spec(tmp_path, PpoConfig()), sft_input)
    policy, scorer = load_policy(sft_lineage, torch.float32), load_scalar(sft_lineage, torch.float32)
    states = policy.base_model(IDS).last_hidden_state
    assert torch.equal(scorer.base_model(IDS).last_hidden_state, states)


@pytest.mark.parametrize("trainable", [False, True])
@KINDS
def test_a_reward_model_scores_the_same_after_a_reload(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig, trainable: bool
) -> None:
    torch.manual_seed(5)
    model = add_adapter(load_scalar(base, torch.float32), adapter, TaskType.SEQ_CLS)
    liven(model)
    head = unwrapped(model).score
    weight = (head.modules_to_save["default"] if isinstance(model, PeftModel) else head).weight.detach().clone()
    before = _scores(model)
    spec = tiny_spec(tmp_path, PpoConfig())
    tensors = {"weight": weight, "offset": torch.tensor(0.5)}
    reward = publish_tiny(tiny_spec(tmp_path / "reward", PpoConfig()), model, base, head=tensors)
    again = load_reward_model(spec, reward, device=CPU, trained=torch.float32 if trainable else None)
    close(_scores(again), before - 0.5, atol=1e-6)
    assert float(before.std()) > 0.05, "scores should differ"
    assert not again.training


@KINDS
def test_a_reward_model_is_frozen_and_a_value_model_is_trained_as_the_reward_model_was(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig
) -> None:
    reward = tiny_reward(tmp_path, adapter, start=base)
    spec = tiny_spec(tmp_path, PpoConfig())
    frozen = load_reward_model(spec, reward, device=CPU)
    assert not [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]
    value = load_reward_model(spec, reward, device=CPU, trained=torch.float32)
    trained = [name for name, parameter in value.named_parameters() if parameter.requires_grad]
    assert any("score" in name for name in trained)
    if adapter.kind is AdapterKind.full:
        assert len(trained) == len(list(value.parameters()))
    else:
        assert all(".lora_" in name or "score" in name for name in trained)


def test_an_artifact_without_a_head_is_no_reward_model(tmp_path: Path, base: Lineage) -> None:
    policy = publish_tiny(tiny_spec(tmp_path, SftConfig()), _trained(base, LORA), base)
    with pytest.raises(ModelError, match=r"no scalar head \(head\.safetensors\) here"):
        load_reward_model(tiny_spec(tmp_path, PpoConfig()), policy, device=CPU)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pad_token_pads_with_eos(base: Lineage) -> None:
    file = base.base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(base.base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_an_end_is_refused(base: Lineage) -> None:
    file = base.base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the tokenizer has no EOS token"):
        load_tokenizer(base.base)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the tokenizer cannot be used"):
        load_tokenizer(tmp_path)


def test_tokenizer_hashes_notice_the_vocabulary_and_the_template_separately(base: Lineage) -> None:
    tokenizer = load_tokenizer(base.base)
    before = tokenizer_hashes(tokenizer)
    assert tokenizer_hashes(load_tokenizer(base.base)) == before
    tokenizer.chat_template += " "
    changed = tokenizer_hashes(tokenizer)
    assert changed["chat_template_sha256"] != before["chat_template_sha256"]
    assert changed["tokenizer_sha256"] == before["tokenizer_sha256"]
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer_hashes(tokenizer)["tokenizer_sha256"] != before["tokenizer_sha256"]
