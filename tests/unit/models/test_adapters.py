"""Adapters change nothing until they are trained, sit on linear modules, and merge into what they were trained as."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import TaskType, peft_model

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.core.errors import ModelError
from alignment.models.assembly.adapters import add_adapter, merge_adapter, put_back, put_in_order
from tests.oracles.close import close
from tests.tiny import ARCHITECTURES, liven, tiny_model, tiny_scorer
from tests.unit.models.conftest import relative

IDS = torch.tensor([[5, 6, 7, 8, 2]])
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def _trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model(IDS).logits
    after = add_adapter(model, AdapterConfig(), TaskType.CAUSAL_LM)(input_ids=IDS).logits
    assert torch.equal(after, before)


@pytest.mark.parametrize("task", [TaskType.CAUSAL_LM, TaskType.SEQ_CLS])
def test_all_linear_means_every_linear_module_but_the_head(task: TaskType) -> None:
    model = tiny_model() if task is TaskType.CAUSAL_LM else tiny_scorer()
    wrapped = add_adapter(model, AdapterConfig(target_modules=["all-linear"]), task)
    factors = [name for name in _trained_names(wrapped) if ".lora_" in name]
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in factors} == LINEAR
    assert len(factors) == 2 * len(LINEAR) * model.config.num_hidden_layers


def test_named_modules_get_an_adapter_and_no_others() -> None:
    wrapped = add_adapter(tiny_model(), AdapterConfig(target_modules=["q_proj", "v_proj"]), TaskType.CAUSAL_LM)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in _trained_names(wrapped)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_factors_on_the_head_or_the_embeddings_are_refused(name: str) -> None:
    """The fast forward multiplies by the head's own weight, and merged factors would change a tied head."""
    with pytest.raises(ModelError, match=rf"factors on {name} are not supported[\s\S]*modules_to_save=\[{name}\]"):
        add_adapter(tiny_model(), AdapterConfig(target_modules=["q_proj", name]), TaskType.CAUSAL_LM)


def test_rank_alpha_and_dropout_arrive() -> None:
    config = AdapterConfig(rank=3, alpha=12.0, dropout=0.25, target_modules=["q_proj"])
    wrapped = add_adapter(tiny_model(), config, TaskType.CAUSAL_LM)
    module = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    assert module.lora_A["default"].weight.shape == (3, 32)
    assert module.scaling["default"] == 4.0
    assert module.lora_dropout["default"].p == 0.25


def test_a_reward_models_head_is_trained_beside_its_adapter() -> None:
    wrapped = add_adapter(tiny_scorer(), AdapterConfig(), TaskType.SEQ_CLS)
    assert [name for name in _trained_names(wrapped) if ".lora_" not in name] == [
        "base_model.model.score.modules_to_save.default.weight"
    ]


def test_full_training_leaves_the_model_as_it_is() -> None:
    model = tiny_model()
    assert add_adapter(model, AdapterConfig(kind=AdapterKind.full), TaskType.CAUSAL_LM) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_unknown_target_modules_are_an_error_that_names_the_setting() -> None:
    with pytest.raises(ModelError, match=r"adapter\.target_modules: the adapter does not fit") as caught:
        add_adapter(tiny_model(), AdapterConfig(target_modules=["query"]), TaskType.CAUSAL_LM)
    assert "['all-linear']" in str(caught.value)


def test_unknown_modules_to_save_are_an_error_that_names_the_setting() -> None:
    """PEFT leaves them out without a word."""
    with pytest.raises(
        ModelError, match=r"adapter\.modules_to_save: no module of this model is called 'embed_token"
    ) as (caught):
        add_adapter(tiny_model("gpt2"), AdapterConfig(modules_to_save=["lm_head", "embed_tokens"]), TaskType.CAUSAL_LM)
    assert "→ one of: transformer, wte, wpe" in str(caught.value)
    with pytest.raises(ModelError, match="did you mean 'embed_tokens'"):
        add_adapter(tiny_model(), AdapterConfig(modules_to_save=["embed_token"]), TaskType.CAUSAL_LM)
    add_adapter(tiny_scorer(), AdapterConfig(modules_to_save=["embed_tokens", "lm_head"]), TaskType.SEQ_CLS)
    with pytest.raises(ModelError, match="did you mean 'embed_tokens'"):
        add_adapter(tiny_scorer(), AdapterConfig(modules_to_save=["embed_tokenz"]), TaskType.SEQ_CLS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_adapter_says_what_it_said_unmerged(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    plain = copy.deepcopy(model)
    wrapped = add_adapter(model, AdapterConfig(rank=4), TaskType.CAUSAL_LM)
    liven(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    expected = wrapped(input_ids=IDS).logits
    assert relative(expected, plain(IDS).logits) > 1e-2, "the adapter should matter"
    close(merge_adapter(plain, tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_is_read_to_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with GPUs, which PEFT would take on the way."""
    add_adapter(tiny_model(), AdapterConfig(), TaskType.CAUSAL_LM).save_pretrained(str(tmp_path))
    monkeypatch.setattr(peft_model, "infer_device", lambda: pytest.fail("PEFT chose a device"))
    merge_adapter(tiny_model(), tmp_path)
    put_back(tiny_model(), [tmp_path], trainable=False)


def test_an_adapter_of_another_architecture_is_an_error_that_names_it(tmp_path: Path) -> None:
    wrapped = add_adapter(tiny_model(hidden_size=64), AdapterConfig(rank=4), TaskType.CAUSAL_LM)
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="this adapter does not fit the model") as caught:
        merge_adapter(tiny_model(), tmp_path)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("order", [1, -1])
def test_a_saved_adapter_names_its_modules_in_one_order(tmp_path: Path, order: int) -> None:
    """PEFT writes a set, whose order is another one in each process."""
    wrapped = add_adapter(tiny_model(), AdapterConfig(target_modules=["v_proj", "q_proj"]), TaskType.CAUSAL_LM)
    wrapped.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"target_modules": ["q_proj", "v_proj"][::order]}, indent=2, sort_keys=True))
    put_in_order(tmp_path)
    assert json.loads(file.read_text()) == settings | {"target_modules": ["q_proj", "v_proj"]}
    assert file.read_text() == json.dumps(json.loads(file.read_text()), indent=2, sort_keys=True)
