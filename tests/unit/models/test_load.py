"""Policies and reward models come back from their files as they were saved, on the base that they stand on."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Critic, Dtype, ModelConfig
from alignment.core.errors import ArtifactError, ModelError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.engine_weights import write_adapter, write_base, write_model
from alignment.models.assembly.heads import ActorCritic, load_reward_model
from alignment.models.assembly.load import (
    Lineage,
    frozen_copy,
    lineage,
    load_policy,
    load_scalar,
    refuse_other_tokenizer,
)
from alignment.models.assembly.modules import keep_first_layers
from alignment.models.assembly.roles import build_roles, share_frozen
from alignment.models.assembly.weight_file import copied_in_calls, copy_weights, is_mapped
from alignment.models.forward.answers import answer_stream, scalar_scores, unwrapped
from alignment.models.forward.rows import stream
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.stages.ppo.trainer_setup import roles_of
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from tests.chained import QLORA, Chained, config_of
from tests.device import need_bitsandbytes
from tests.oracles.close import close
from tests.tiny import ARCHITECTURES, liven, publish_tiny, save_tiny_model, tiny_model, tiny_reward, tiny_spec
from tests.unit.models.conftest import CPU, FULL, KINDS, LORA, adapted, assert_same_gradients, gradients, relative

IDS = torch.tensor([[5, 6, 7, 8, 2]])
PAIRS = [[5, 6, 7, 2], [5, 6, 9, 9, 2], [8, 2], [8, 7, 2], [3, 3, 2], [3, 2], [11, 12, 13, 2], [11, 12, 2]]


def _trained(start: Lineage, adapter: AdapterConfig) -> torch.nn.Module:
    model = adapted(load_policy(start, torch.float32), adapter)
    if adapter.kind is AdapterKind.full:
        model.model.norm.weight.data.mul_(1.5)
    return model


@pytest.mark.parametrize("second", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("first", [LORA, FULL], ids=["lora", "full"])
def test_a_policy_trained_in_two_stages_is_found_again_without_the_first(
    tmp_path: Path, base: Lineage, first: AdapterConfig, second: AdapterConfig
) -> None:
    """Adapters below are copied; a trained base is as well."""
    sft = _trained(base, first)
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig(adapter=first)), sft, base)
    dpo_spec = tiny_spec(tmp_path, DpoConfig(adapter=second), inputs={"init": sft_input})
    restored = lineage(dpo_spec, sft_input)
    policy = load_policy(restored, torch.float32)
    close(policy(IDS).logits, sft(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    assert not policy.training
    assert policy.config.use_cache is False
    scorer = load_scalar(restored, torch.float32)
    assert torch.equal(scorer.base_model(IDS).last_hidden_state, policy.base_model(IDS).last_hidden_state)
    dpo = _trained(restored, second)
    dpo_input = publish_tiny(dpo_spec, dpo, restored)
    sft_input.path.rename(tmp_path / "elsewhere")
    again = load_policy(lineage(dpo_spec, dpo_input), torch.float32)(IDS).logits
    close(again, dpo(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert relative(again, sft(input_ids=IDS).logits) > 1e-3, "the second stage should matter"


def test_a_base_is_known_by_its_content_under_any_name(tmp_path: Path, base: Lineage) -> None:
    """A stage that started from another folder is found there; an artifact of another base is refused."""
    made_on = {"base": {"content": "one"}}
    sft_input = publish_tiny(tiny_spec(tmp_path, SftConfig(), identity=made_on), _trained(base, LORA), base)
    model = ModelConfig(source="path:elsewhere", dtype=Dtype.float32)
    assert lineage(tiny_spec(tmp_path, DpoConfig(), identity=made_on, model=model), sft_input).base == base.base
    spec = tiny_spec(tmp_path, DpoConfig(), identity={"base": {"content": "two"}})
    with pytest.raises(ModelError, match="stage:sft was trained on path:tiny, not on this run's base"):
        lineage(spec, sft_input)
    folder = save_tiny_model(tmp_path / "other", seed=3)
    start = Lineage(source=f"path:{folder}", base=folder, adapters=())
    spec = tiny_spec(tmp_path / "of other", SftConfig(), identity=made_on)
    other_input = publish_tiny(spec, _trained(start, LORA), start)
    assert lineage(tiny_spec(tmp_path, DpoConfig(), identity=made_on), other_input).base == folder


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"length_penalty": 0.8, "early_stopping": True}, {}),
        # Settings that cannot be corrected are left alone: untouched, transformers writes them.
        ({"do_sample": False, "temperature": 0.7, "output_hidden_states": True}, {"temperature": 0.7}),
    ],
)
def test_published_settings_of_generation_can_be_written_again(
    tmp_path: Path, base: Lineage, settings: dict[str, Any], written: dict[str, Any]
) -> None:
    """transformers reads all of these, but refuses to write some of them once a token has been set."""
    (base.base / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    model = load_policy(base, torch.float32)
    if "output_hidden_states" not in settings:
        model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(tmp_path / "saved")
    content = json.loads((tmp_path / "saved/generation_config.json").read_text())
    of_sampling = ("do_sample", "temperature", "top_p", "top_k", "length_penalty", "early_stopping", "pad_token_id")
    assert {name: content[name] for name in of_sampling if content.get(name)} == written
    if "output_hidden_states" not in settings:
        assert content["eos_token_id"] == [2, 5]


def test_another_tokenizer_is_refused_by_name(tmp_path: Path, base: Lineage) -> None:
    other = save_tiny_model(tmp_path / "other", seed=3)
    tokenizer = load_tokenizer(other)
    spec, at = tiny_spec(tmp_path, DpoConfig()), StageInput(ref=f"path:{other}", path=other)
    refuse_other_tokenizer(spec, at, tokenizer)  # the same one passes
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(str(other))
    with pytest.raises(ModelError, match="a different tokenizer or chat template") as caught:
        refuse_other_tokenizer(spec, at, load_tokenizer(base.base))
    assert caught.value.where == "stages.dpo"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no model here"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the model cannot be loaded"),
        (lambda folder: os.truncate(folder / "model.safetensors", 1000), "the model cannot be loaded"),
    ],
)
def test_a_folder_without_a_whole_model_is_refused(base: Lineage, damage: Callable[[Path], None], message: str) -> None:
    damage(base.base)
    with pytest.raises(ModelError, match=message):
        load_policy(base, torch.float32)


def test_a_damaged_artifact_is_refused_before_anything_is_built_on_it(tmp_path: Path, base: Lineage) -> None:
    spec = tiny_spec(tmp_path, SftConfig())
    sft_input = publish_tiny(spec, _trained(base, LORA), base)
    file = next(spec.artifact.glob("adapters/*/adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="content differs from its manifest"):
        lineage(spec, sft_input)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_copy_says_the_same_in_less_memory(architecture: str) -> None:
    """Biases, heads that are tied and heads that are not."""
    model = tiny_model(architecture).eval()
    copied = frozen_copy(model, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert sum(p.nbytes for p in copied.parameters()) < 0.75 * sum(p.nbytes for p in model.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copied(IDS).logits, model(IDS).logits)


def _scores(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return scalar_scores(model, stream(PAIRS, torch.device("cpu")))


@pytest.mark.parametrize("architecture", ["olmoe", "granitemoe"])
def test_an_architecture_without_scores_is_named_with_what_works_instead(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny_model(tmp_path / "experts", architecture=architecture)
    with pytest.raises(ModelError, match=rf"^path:experts: .* the architecture '{architecture}', which") as caught:
        load_scalar(Lineage(source="path:experts", base=folder, adapters=()), torch.float32)
    assert "a base of another family" in caught.value.remedy
    assert "critic=shared or none" in caught.value.remedy


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
    policy = publish_tiny(tiny_spec(tmp_path, SftConfig()), _trained(base, LORA), base)
    with pytest.raises(ModelError, match=r"no scalar head \(head\.safetensors\) here"):
        load_reward_model(spec, policy, device=CPU)


def test_a_tokenizer_pads_with_eos_and_needs_one(base: Lineage) -> None:
    file = base.base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(base.base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    del settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the tokenizer has no EOS token"):
        load_tokenizer(base.base)
    shutil.rmtree(base.base)
    with pytest.raises(ModelError, match="the tokenizer cannot be used"):
        load_tokenizer(base.base)


def _stored(folder: Path, dtype: torch.dtype, architecture: str = "llama") -> Lineage:
    save_tiny_model(folder, architecture=architecture)
    model = load_policy(Lineage(source="self", base=folder, adapters=()), torch.float32)
    model.to(dtype).save_pretrained(str(folder))
    return Lineage(source="self", base=folder, adapters=())


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    scores: Tensor = model(IDS).logits
    return scores


@pytest.mark.parametrize(
    ("dtype", "architecture"),  # with tied heads and without
    [(torch.bfloat16, "llama"), (torch.float16, "qwen2"), (torch.float32, "llama")],
)
def test_calls_compute_with_copies_and_leave_nothing(tmp_path: Path, dtype: torch.dtype, architecture: str) -> None:
    lineage = _stored(tmp_path / "base", dtype, architecture)
    whole, mapped = load_policy(lineage, torch.float32), load_policy(lineage, torch.float32, mapped=True)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in mapped.named_parameters()}
    assert {held for _, held in before.values()} == {dtype}
    assert mapped.config.dtype is whole.config.dtype
    with copied_in_calls(mapped, CPU):
        assert torch.equal(_logits(mapped), _logits(whole))
        for weight in mapped.parameters():
            assert weight.isnan().all(), "no weight may be read outside of its module's call"
            assert weight.untyped_storage().nbytes() == 4
            assert weight.dtype is torch.float32
            assert not weight.requires_grad, "autocast would keep what it converts of a trained weight"
    assert {name: (weight.data_ptr(), weight.dtype) for name, weight in mapped.named_parameters()} == before
    assert all(weight.requires_grad for weight in mapped.parameters())


NORMS = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_has_the_states_after_these_layers_under_the_same_norm_and_head(
    tmp_path: Path, architecture: str, layers: int
) -> None:
    """Also after it was saved and loaded by transformers."""
    whole = tiny_model(architecture, num_hidden_layers=4)
    with torch.no_grad():
        states = whole(IDS, output_hidden_states=True).hidden_states[layers]
        norm = getattr(whole.base_model, NORMS.get(architecture, "norm"))
        expected = whole.get_output_embeddings()(norm(states))
    keep_first_layers(whole, layers).save_pretrained(str(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert saved.config.num_hidden_layers == layers
    with torch.no_grad():
        close(saved(IDS).logits, expected, atol=1e-5)
        close(whole(IDS).logits, expected, atol=1e-5)


STACK, CONTINUED = AdapterConfig(rank=4, chain=Chain.stack), AdapterConfig(rank=4, chain=CONTINUE)


@torch.no_grad()
def _row_logits(model: torch.nn.Module) -> Tensor:
    return model(IDS).logits[0]


def as_an_engine_reads(base: Path, adapter: Path | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    return _row_logits(model if adapter is None else PeftModel.from_pretrained(model, str(adapter)))


@pytest.mark.parametrize(
    ("before", "adapter", "is_base"),
    [(None, LORA, True), (LORA, STACK, False), (LORA, CONTINUED, True), (None, QLORA, False), (LORA, QLORA, False)],
    ids=["LoRA", "LoRA on LoRA", "LoRA continued", "QLoRA", "QLoRA on LoRA"],
)
def test_base_and_adapter_are_the_policy(
    tmp_path: Path, before: AdapterConfig | None, adapter: AdapterConfig, is_base: bool
) -> None:
    if adapter is QLORA:
        need_bitsandbytes()
    chained = Chained(tmp_path)
    if before is not None:
        chained.run("sft", before)
    init = "base" if before is None else "sft"
    config = config_of("ppo", adapter, reward=None, advantage=Advantage.rloo, critic=Critic.none)
    assert isinstance(config, PpoConfig)
    spec = chained.spec("ppo", adapter, init=init, config=config)
    context = StageContext(spec=spec, rank=0, world_size=1)
    start = lineage(spec, spec.inputs["init"])
    policy = roles_of(config, context, start, None).policy
    liven(policy)
    base = write_base(start, adapter, torch.float32, tmp_path / "engine")
    assert (base == chained.base) is is_base
    own = write_adapter(policy, None, tmp_path / "own")
    read = as_an_engine_reads(base, own)
    close(read, _row_logits(unwrapped(policy)), atol=1e-5, rtol=1e-4)
    assert float((read - as_an_engine_reads(base, None)).abs().max()) > 1e-2, "the adapter should do something"


def test_whole_weights_are_the_policy_and_a_later_version_replaces_both_matrices(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    spec = chained.spec("ppo", FULL, config=config_of("ppo", FULL, reward=None))
    start = lineage(spec, spec.inputs["init"])
    base = write_base(start, FULL, torch.float32, tmp_path / "engine")
    model = AutoModelForCausalLM.from_pretrained(str(chained.base), dtype=torch.float32).eval()
    close(as_an_engine_reads(base, None), _row_logits(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    weights = dict(model.named_parameters(remove_duplicate=False))
    later = write_model(model, weights, torch.float32, tmp_path / "policy-1")
    close(as_an_engine_reads(later, None), _row_logits(model), atol=1e-5)
    base = write_base(start, FULL, torch.bfloat16, tmp_path / "as the stage computes")
    written = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    assert {p.dtype for p in written.parameters()} == {torch.bfloat16}


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


def test_a_frozen_copy_stays_in_the_file_and_becomes_what_it_is_otherwise(tmp_path: Path) -> None:
    lineage = _stored(tmp_path / "base", torch.float16)
    whole = frozen_copy(load_policy(lineage, torch.float32), torch.bfloat16)
    mapped = load_policy(lineage, torch.float32, mapped=True)
    reference = frozen_copy(mapped, torch.bfloat16)
    for weight, original in zip(reference.parameters(), mapped.parameters(), strict=True):
        assert weight is not original
        assert weight.data_ptr() == original.data_ptr()
        assert not weight.requires_grad
    copy_weights(reference.parameters())
    assert all(is_mapped(weight) for weight in mapped.parameters()), "the policy's are still to be copied"
    assert {weight.dtype for weight in reference.parameters()} == {torch.float32, torch.bfloat16}
    for (name, copied), expected in zip(reference.named_parameters(), whole.parameters(), strict=True):
        assert copied.dtype is expected.dtype, name
        assert torch.equal(copied, expected), name


PART = answer_stream([[5, 6, 2], [9]], [[7, 8, 2], [2]], CPU)


def test_sharing_takes_equal_frozen_weights_only() -> None:
    owner = tiny_model("qwen2").requires_grad_(False)
    model = copy.deepcopy(owner)
    parameters = dict(model.named_parameters())
    names = list(parameters)
    parameters[names[1]].data.add_(1.0)
    parameters[names[2]].requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert share_frozen(model, owner) == len(names) - 2
    now, owned = dict(model.named_parameters()), dict(owner.named_parameters())
    assert [name for name, parameter in now.items() if parameter is not owned[name]] == [names[1], names[2]]
    for name, parameter in now.items():
        assert torch.equal(parameter, before[name])
    assert share_frozen(tiny_model("qwen2").requires_grad_(False), tiny_model("qwen2")) == 0, "the owner trains all"


def _actor_critic(folder: Path, base: Lineage, adapter: AdapterConfig, critic: Critic) -> ActorCritic:
    reward = tiny_reward(folder, adapter, start=base)
    roles = build_roles(tiny_spec(folder, PpoConfig()), base, reward, adapter, device=CPU, critic=critic)
    liven(roles.actor_critic)
    return roles.actor_critic


def _squares(values: Tensor) -> Tensor:
    return 0.3 * values.square().sum()


@KINDS
@pytest.mark.parametrize("critic", [Critic.separate, Critic.shared])
def test_gradients_are_those_of_the_sum_of_both_losses(
    tmp_path: Path, base: Lineage, adapter: AdapterConfig, critic: Critic
) -> None:
    model = _actor_critic(tmp_path, base, adapter, critic)
    twin = copy.deepcopy(model)
    statistics, loss = model(PART, 1.0, _squares)
    (2.0 * (statistics.logprobs.sum() + loss)).backward()
    statistics, values = twin.look(PART, 1.0)
    assert statistics.logprobs.shape == values.shape == (4,)
    (2.0 * (statistics.logprobs.sum() + _squares(values))).backward()
    assert any("value." in name for name in gradients(model))
    assert_same_gradients(model, twin, tolerance=1e-6)


def test_a_critic_on_the_trunk_teaches_it_only_with_the_policy(tmp_path: Path, base: Lineage) -> None:
    model = _actor_critic(tmp_path, base, LORA, Critic.shared)
    model(PART, 1.0, _squares, policy_learns=False)[1].backward()
    assert list(gradients(model)) == ["value.weight"]
