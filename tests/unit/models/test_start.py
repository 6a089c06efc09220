"""What a stage starts from: adapters of earlier stages merged, beside it or continued, and the reference to that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType

from alignment.config.adapter import CONTINUE, AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.core.errors import ConfigError
from alignment.models.assembly.adapters import at_start
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.start import load_start, turn_off_dropout
from alignment.models.kernels.nf4 import Nf4Linear, round_trunk
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.sft.config import SftConfig
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE, liven, publish_tiny, save_tiny_model, tiny_model, tiny_spec
from tests.unit.models.conftest import relative

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 4, 3, 2]])
KINDS = [AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora]
CHAINS = pytest.mark.parametrize(
    ("kind", "chain"),
    [(kind, chain) for kind in KINDS for chain in Chain if (kind, chain) != (AdapterKind.dora, Chain.stack)],
)
"""DoRA turns the weight that it finds, so two of them do not add up, and the configuration refuses to stack one."""


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    """A model folder as a run's base."""
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


def _adapter(kind: AdapterKind, chain: Chain = Chain.merge) -> AdapterConfig:
    return AdapterConfig(kind=kind, chain=chain, rank=4)


def _start(start: Lineage, adapter: AdapterConfig, task: TaskType = TaskType.CAUSAL_LM) -> Any:
    torch.manual_seed(3)
    return load_start(start, adapter, Dtype.float32, task=task, device=CPU).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _first_stage(folder: Path, base: Lineage, adapter: AdapterConfig) -> tuple[torch.Tensor, Lineage]:
    """What a policy said that was trained, and where it lies."""
    model = _start(base, adapter)
    liven(model)
    spec = tiny_spec(folder, SftConfig(adapter=adapter))
    saved = publish_tiny(spec, model, base)
    return _logits(model), lineage(spec, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_says_what_it_said_in_training(tmp_path: Path, base: Lineage, kind: AdapterKind) -> None:
    expected, saved = _first_stage(tmp_path, base, _adapter(kind))
    close(_logits(load_policy(saved, torch.float32)), expected, rtol=1e-4, atol=1e-4)


@CHAINS
def test_a_second_stage_starts_where_the_first_ended(
    tmp_path: Path, base: Lineage, kind: AdapterKind, chain: Chain
) -> None:
    """Only merging into four bits rounds anew; the policy then starts a little elsewhere, and says so of itself."""
    expected, saved = _first_stage(tmp_path, base, _adapter(kind))
    start = _start(saved, _adapter(kind, chain))
    if kind is AdapterKind.qlora and chain is Chain.merge:
        merged = load_policy(saved, torch.float32)
        round_trunk(merged)
        close(_logits(start), _logits(merged), rtol=1e-4, atol=1e-4)
        assert 1e-3 < relative(_logits(start), expected) < 1.0
    else:
        close(_logits(start), expected, rtol=1e-4, atol=1e-4)


@CHAINS
def test_the_reference_stays_where_the_stage_began(
    tmp_path: Path, base: Lineage, kind: AdapterKind, chain: Chain
) -> None:
    _, saved = _first_stage(tmp_path, base, _adapter(kind))
    model = _start(saved, _adapter(kind, chain))
    began = _logits(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained, "something is trained"
    assert all(".default" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    assert relative(_logits(model), began) > 1e-2
    moved = _logits(model)
    with at_start(model) as reference:
        close(_logits(reference), began, rtol=1e-5, atol=1e-5)
    assert torch.equal(_logits(model), moved)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@CHAINS
def test_a_chain_of_three_is_found_again(tmp_path: Path, base: Lineage, kind: AdapterKind, chain: Chain) -> None:
    """The third stage stacks on what the second left, so that folders of all kinds of standing lie in one artifact."""
    _, saved = _first_stage(tmp_path, base, _adapter(kind))
    third = AdapterKind.lora if kind is AdapterKind.dora else kind
    for number, adapter in enumerate((_adapter(kind, chain), _adapter(third, Chain.stack))):
        spec = tiny_spec(tmp_path / str(number), DpoConfig(adapter=adapter), base_path=base.base)
        model = _start(saved, adapter)
        liven(model)
        saved = lineage(spec, publish_tiny(spec, model, saved))
        close(_logits(load_policy(saved, torch.float32)), _logits(model), rtol=1e-4, atol=1e-4)
    assert len(saved.adapters) == (2 if chain is CONTINUE else 3)


def test_what_was_stacked_loads_in_peft_alone(tmp_path: Path, base: Lineage) -> None:
    expected, saved = _first_stage(tmp_path, base, _adapter(AdapterKind.lora))
    model = _start(saved, _adapter(AdapterKind.lora, Chain.stack))
    liven(model)
    spec = tiny_spec(tmp_path, DpoConfig(adapter=_adapter(AdapterKind.lora, Chain.stack)))
    saved = lineage(spec, publish_tiny(spec, model, saved))
    plain = PeftModel.from_pretrained(load_policy(base, torch.float32), str(saved.adapters[0].path))
    close(_logits(plain), expected, rtol=1e-5, atol=1e-5)
    plain.load_adapter(str(saved.adapters[1].path), "dpo")
    plain.base_model.set_adapter(["default", "dpo"])
    close(_logits(plain), _logits(model), rtol=1e-5, atol=1e-5)


@CHAINS
def test_under_a_scalar_head_the_trunk_is_the_policys(
    tmp_path: Path, base: Lineage, kind: AdapterKind, chain: Chain
) -> None:
    _, saved = _first_stage(tmp_path, base, _adapter(kind))
    policy, scorer = (_start(saved, _adapter(kind, chain), task) for task in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS))
    states = [model.get_base_model().base_model(IDS).last_hidden_state for model in (policy, scorer)]
    close(*states, rtol=1e-5, atol=1e-5)
    trained = [name for name, parameter in scorer.named_parameters() if parameter.requires_grad]
    assert "base_model.model.score.modules_to_save.default.weight" in trained


def test_four_bits_are_held_and_factors_learn(base: Lineage) -> None:
    model = _start(base, _adapter(AdapterKind.qlora))
    assert any(isinstance(module, Nf4Linear) for module in model.modules())
    liven(model)
    model(input_ids=IDS).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(bool(torch.isfinite(grad).all()) and float(grad.abs().sum()) > 0 for grad in grads.values())


def test_a_scale_by_the_root_of_the_rank(base: Lineage) -> None:
    model = _start(base, AdapterConfig(rank=4, alpha=6.0, rslora=True))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 3.0


def test_modules_trained_whole_are_saved_and_found_again(tmp_path: Path, base: Lineage) -> None:
    adapter = AdapterConfig(rank=4, modules_to_save=["embed_tokens"])
    model = _start(base, adapter)
    liven(model)
    embeddings = model.get_base_model().model.embed_tokens
    embeddings.modules_to_save["default"].weight.data.mul_(1.1)
    spec = tiny_spec(tmp_path, SftConfig(adapter=adapter))
    saved = lineage(spec, publish_tiny(spec, model, base))
    close(_logits(load_policy(saved, torch.float32)), _logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE])
def test_modules_trained_whole_are_only_merged(tmp_path: Path, base: Lineage, chain: Chain) -> None:
    adapter = AdapterConfig(rank=4, modules_to_save=["embed_tokens"])
    spec = tiny_spec(tmp_path, SftConfig(adapter=adapter))
    saved = lineage(spec, publish_tiny(spec, _start(base, adapter), base))
    with pytest.raises(ConfigError, match=f"has trained embed_tokens, .* adapter.chain is '{chain.value}'"):
        _start(saved, AdapterConfig(rank=4, chain=chain))
    _start(saved, AdapterConfig(rank=4))


@pytest.mark.parametrize(
    ("architecture", "module"),
    [("llama", "embed_tokens"), ("gpt2", "wte"), ("gpt2", "lm_head"), ("gpt_neox", "embed_in")],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_tied_head_is_trained_with_its_embeddings(tmp_path: Path, architecture: str, module: str) -> None:
    folder = save_tiny_model(tmp_path / "base", architecture=architecture, tie_word_embeddings=True)
    start = Lineage(source=BASE_SOURCE, base=folder, adapters=())
    adapter = AdapterConfig(rank=4, modules_to_save=[module])
    model = _start(start, adapter)
    (rows,) = {p for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    model(input_ids=IDS).logits.square().mean().backward()
    assert rows.grad is not None
    assert float(rows.grad[100].abs().sum()) > 0.0, "a token that is only in the head's output"
    with torch.no_grad():
        rows.mul_(1.1)
    spec = tiny_spec(tmp_path, SftConfig(adapter=adapter))
    merged = load_policy(lineage(spec, publish_tiny(spec, model, start)), torch.float32)
    close(_logits(merged), _logits(model), rtol=1e-4, atol=1e-4)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("below", [AdapterKind.lora, AdapterKind.dora])
def test_dora_does_not_stay_beside_weights_in_four_bits(tmp_path: Path, base: Lineage, below: AdapterKind) -> None:
    _, saved = _first_stage(tmp_path, base, _adapter(AdapterKind.dora))
    if below is AdapterKind.lora:
        spec = tiny_spec(tmp_path / "dpo", DpoConfig(adapter=_adapter(below, Chain.stack)), base_path=base.base)
        model = _start(saved, _adapter(below, Chain.stack))
        saved = lineage(spec, publish_tiny(spec, model, saved))
    for chain in (Chain.stack, CONTINUE):
        with pytest.raises(
            ConfigError, match=rf"is a DoRA adapter, .* adapter.chain is '{chain.value}'\n  → set it to m"
        ):
            _start(saved, _adapter(AdapterKind.qlora, chain))
    _start(saved, _adapter(AdapterKind.qlora))


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE], ids=lambda chain: chain.value)
def test_what_was_trained_on_four_bits_does_not_stay_beside_whole_weights(
    tmp_path: Path, base: Lineage, chain: Chain
) -> None:
    """Beside others than it learned on, the adapter makes another policy."""
    expected, saved = _first_stage(tmp_path, base, _adapter(AdapterKind.qlora))
    with pytest.raises(ConfigError, match=rf"was trained on weights in four bits, .* '{chain.value}'\n  → set it to m"):
        _start(saved, _adapter(AdapterKind.lora, chain))
    close(_logits(_start(saved, _adapter(AdapterKind.lora))), expected, rtol=1e-4, atol=1e-4)


def test_without_an_adapter_there_is_nothing_to_continue(base: Lineage) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.chain: there is no adapter to continue"):
        _start(base, _adapter(AdapterKind.lora, CONTINUE))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"rank": 8}, "rank"),
        ({"rank": 4, "alpha": 1.0}, "alpha"),
        ({"rank": 4, "kind": AdapterKind.dora}, "kind"),
        ({"rank": 4, "target_modules": ["q_proj", "v_proj"]}, "target_modules"),
    ],
)
def test_an_adapter_keeps_its_shape_when_it_is_continued(
    tmp_path: Path, base: Lineage, changes: dict[str, Any], where: str
) -> None:
    _, saved = _first_stage(tmp_path, base, _adapter(AdapterKind.lora))
    with pytest.raises(ConfigError, match=rf"adapter\.{where}: the adapter to continue has"):
        _start(saved, AdapterConfig(**{"chain": CONTINUE, **changes}))


@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
def test_an_adapter_on_experts_is_continued_with_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    """PEFT saves the names of parameters in place of those of the experts' projections."""
    folder = save_tiny_model(tmp_path / "base", architecture="mixtral")
    adapter = AdapterConfig(rank=4, target_modules=["q_proj", "w1", "w2", "w3"])
    expected, saved = _first_stage(tmp_path, Lineage(source=BASE_SOURCE, base=folder, adapters=()), adapter)
    close(_logits(_start(saved, replace(adapter, chain=CONTINUE))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE], ids=lambda chain: chain.value)
def test_only_what_is_trained_drops_anything_and_as_this_stage_says(
    tmp_path: Path, base: Lineage, chain: Chain
) -> None:
    _, saved = _first_stage(tmp_path, base, AdapterConfig(rank=4, dropout=0.5))
    model = load_start(
        saved, AdapterConfig(rank=4, dropout=0.25, chain=chain), Dtype.float32, task=TaskType.CAUSAL_LM, device=CPU
    )
    rates: dict[str, set[float]] = {}
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            for name, dropout in module.lora_dropout.items():
                rates.setdefault(name, set()).add(getattr(dropout, "p", 0.0))
    assert rates.pop("default") == {0.25}
    assert list(rates.values()) == [{0.0}]


def test_dropout_that_is_turned_off_stays_off_in_training_mode(base: Lineage) -> None:
    """Of adapters, whole modules and attention, whose rate is a plain number."""
    adapter = AdapterConfig(rank=4, dropout=0.5)
    model = load_start(base, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=CPU)
    attentive = tiny_model(attention_dropout=0.5)
    for policy in (model, attentive):
        liven(policy)
        policy.train()
        assert relative(_logits(policy), _logits(policy)) > 1e-3, "it drops"
        turn_off_dropout(policy)
        policy.train()
        assert torch.equal(_logits(policy), _logits(policy))


def test_dropout_is_turned_off_under_every_name_that_models_give_it() -> None:
    """Falcon reads its configuration in the forward pass, XGLM keeps a number of its own."""
    model = torch.nn.Linear(1, 1)
    model.activation_dropout = 0.5
    model.config = SimpleNamespace(hidden_dropout=0.5, hidden_size=8, use_dropout=True)
    turn_off_dropout(model)
    assert model.activation_dropout == 0.0
    assert model.config == SimpleNamespace(hidden_dropout=0.0, hidden_size=8, use_dropout=True)
