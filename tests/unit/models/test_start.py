"""What a stage starts from: adapters that are merged, stacked or continued, and prefixes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM, TaskType

from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Dtype
from alignment.core.errors import ConfigError, ModelError
from alignment.models.assembly.adapters import add_adapter, at_start, merge_adapter
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.roles import load_start, turn_off_dropout
from alignment.models.forward import decoding
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.rows import stream
from alignment.models.kernels.nf4 import round_trunk
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.oracles.close import close
from tests.tiny import (
    ARCHITECTURES,
    BASE_SOURCE,
    liven,
    publish_tiny,
    save_tiny_model,
    tiny_model,
    tiny_scorer,
    tiny_spec,
)
from tests.unit.models.conftest import CPU, FULL, LORA, padded, relative

IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 4, 3, 2]])
CHAINS = pytest.mark.parametrize(
    ("kind", "chain"),
    [
        (kind, chain)
        for kind in (AdapterKind.lora, AdapterKind.dora, AdapterKind.qlora)
        for chain in Chain
        if (kind, chain) != (AdapterKind.dora, Chain.stack)
    ],
)


def _adapter(kind: AdapterKind, chain: Chain = Chain.merge) -> AdapterConfig:
    return AdapterConfig(kind=kind, chain=chain, rank=4)


def _start(start: Lineage, adapter: AdapterConfig, task: TaskType = TaskType.CAUSAL_LM) -> Any:
    torch.manual_seed(3)
    return load_start(start, adapter, Dtype.float32, task=task, device=CPU).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _first_stage(folder: Path, base: Lineage, adapter: AdapterConfig) -> tuple[torch.Tensor, Lineage]:
    model = _start(base, adapter)
    liven(model)
    spec = tiny_spec(folder, SftConfig(adapter=adapter))
    saved = publish_tiny(spec, model, base)
    return _logits(model), lineage(spec, saved)


@CHAINS
def test_a_second_stage_starts_where_the_first_ended(
    tmp_path: Path, base: Lineage, kind: AdapterKind, chain: Chain
) -> None:
    """Only merging into four bits rounds anew; the policy then starts a little elsewhere, and says so of itself.

    Whatever is learned, the reference stays there; under a scalar head, the trunk is the policy's.
    """
    expected, saved = _first_stage(tmp_path, base, _adapter(kind))
    again = load_policy(saved, torch.float32)
    close(_logits(again), expected, rtol=1e-4, atol=1e-4)
    model, scorer = (_start(saved, _adapter(kind, chain), task) for task in (TaskType.CAUSAL_LM, TaskType.SEQ_CLS))
    began = _logits(model)
    if kind is AdapterKind.qlora and chain is Chain.merge:
        round_trunk(again)
        close(began, _logits(again), rtol=1e-4, atol=1e-4)
        assert 1e-3 < relative(began, expected) < 1.0
    else:
        close(began, expected, rtol=1e-4, atol=1e-4)
    states = [policy.get_base_model().base_model(IDS).last_hidden_state for policy in (model, scorer)]
    close(*states, rtol=1e-5, atol=1e-5)
    assert "base_model.model.score.modules_to_save.default.weight" in _trained_names(scorer)
    trained = _trained_names(model)
    assert trained, "something is trained"
    assert all(".default" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.add_(0.1)
    moved = _logits(model)
    assert relative(moved, began) > 1e-2
    with at_start(model) as reference:
        close(_logits(reference), began, rtol=1e-5, atol=1e-5)
    assert torch.equal(_logits(model), moved)
    assert _trained_names(model) == trained


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


def _refused(start: Lineage, adapter: AdapterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _start(start, adapter)


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
        message = rf"is a DoRA adapter, .* adapter.chain is '{chain.value}'\n  → set it to m"
        _refused(saved, _adapter(AdapterKind.qlora, chain), message)
    _start(saved, _adapter(AdapterKind.qlora))


def test_an_adapter_keeps_its_shape_when_it_is_continued(tmp_path: Path, base: Lineage) -> None:
    _refused(base, replace(LORA, chain=CONTINUE), r"adapter\.chain: there is no adapter to continue")
    _, saved = _first_stage(tmp_path, base, LORA)
    changes: tuple[dict[str, Any], ...] = (
        {"rank": 8},
        {"alpha": 1.0},
        {"kind": AdapterKind.dora},
        {"target_modules": ["q_proj", "v_proj"]},
    )
    for change in changes:
        continued = AdapterConfig(**{"chain": CONTINUE, "rank": 4, **change})
        _refused(saved, continued, rf"adapter\.{next(iter(change))}: the adapter to continue has")


@pytest.mark.parametrize("chain", [Chain.stack, CONTINUE], ids=lambda chain: chain.value)
def test_only_what_is_trained_drops_anything_and_as_this_stage_says(
    tmp_path: Path, base: Lineage, chain: Chain
) -> None:
    _, saved = _first_stage(tmp_path, base, replace(LORA, dropout=0.5))
    model = _start(saved, replace(LORA, dropout=0.25, chain=chain))
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


def _trained_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_changes_nothing_until_it_is_trained_and_merges_into_what_it_was(
    tmp_path: Path, architecture: str
) -> None:
    model = tiny_model(architecture)
    assert add_adapter(model, FULL, TaskType.CAUSAL_LM) is model
    plain = copy.deepcopy(model)
    before = plain(IDS).logits
    wrapped = add_adapter(model, LORA, TaskType.CAUSAL_LM)
    assert torch.equal(wrapped(input_ids=IDS).logits, before)
    liven(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    expected = wrapped(input_ids=IDS).logits
    assert relative(expected, before) > 1e-2, "the adapter should matter"
    close(merge_adapter(plain, tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="this adapter does not fit the model") as caught:
        merge_adapter(tiny_model(architecture, hidden_size=64), tmp_path)
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "changes", "message", "remedy"),
    [
        ("llama", {"target_modules": ["query"]}, r"adapter\.target_modules: the adapter does not fit", "all-linear"),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}, "factors on lm_head", "modules_to_save=[lm_head]"),
        (
            "gpt2",
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            r"adapter\.modules_to_save: no mod",
            "transformer, wte",
        ),
        ("llama", {"modules_to_save": ["embed_token"]}, "did you mean 'embed_tokens'", ""),
        ("scorer", {"modules_to_save": ["embed_tokens", "lm_head"]}, None, ""),
    ],
)
def test_modules_that_do_not_exist_or_take_no_adapter_are_refused(
    architecture: str, changes: dict[str, list[str]], message: str | None, remedy: str
) -> None:
    """PEFT leaves out unknown modules to save. Factors on the head would not count: its own weight is multiplied."""
    model = tiny_scorer() if architecture == "scorer" else tiny_model(architecture)
    task = TaskType.SEQ_CLS if architecture == "scorer" else TaskType.CAUSAL_LM
    if message is None:
        add_adapter(model, AdapterConfig(**changes), task)
        return
    with pytest.raises(ModelError, match=message) as caught:
        add_adapter(model, AdapterConfig(**changes), task)
    assert remedy in str(caught.value)


def test_modules_trained_whole_are_only_merged(tmp_path: Path, base: Lineage) -> None:
    _, saved = _first_stage(tmp_path, base, replace(LORA, modules_to_save=["embed_tokens"]))
    for chain in (Chain.stack, CONTINUE):
        _refused(saved, replace(LORA, chain=chain), f"has trained embed_tokens, .* adapter.chain is '{chain.value}'")
    _start(saved, LORA)


pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # PEFT names it so
PREFIX = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=5)
PROMPT = list(range(20, 40))
ROWS = [[5, 6, 7, 8, 2], [9, 4, 4], [*PROMPT, 3, 3, 2], [*PROMPT, 11]]
"""The last two share their beginning."""


def _wrapped(architecture: str = "llama", **changes: Any) -> Any:
    model = tiny_model(architecture, **changes)
    wrapped = add_adapter(model, PREFIX, TaskType.CAUSAL_LM).eval()
    rng = torch.Generator().manual_seed(3)
    wrapped.prompt_encoder["default"].embedding.weight.data.normal_(std=0.5, generator=rng)
    use_flat_attention(model)
    return wrapped


def _ours(wrapped: Any) -> list[torch.Tensor]:
    base = wrapped.get_base_model()
    use_flat_attention(base)
    rows = stream(ROWS, CPU)
    logits = base.lm_head(trunk_states(base.base_model, rows))
    return [logits[rows.index[number, : len(row)]] for number, row in enumerate(ROWS)]


def _pefts(wrapped: Any) -> list[torch.Tensor]:
    wrapped.get_base_model().set_attn_implementation("eager")
    logits = [PeftModelForCausalLM.forward(wrapped, input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    wrapped.get_base_model().set_attn_implementation(ATTENTION)
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_are_pefts(architecture: str) -> None:
    passes = []
    for compute in (_ours, _pefts):
        wrapped = _wrapped(architecture)
        logits = torch.cat(compute(wrapped))
        logits.square().mean().backward()
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        assert len(trained) == 1, "the prefix alone is trained"
        passes.append((logits.detach(), trained[0].grad))
    assert relative(passes[0][0], passes[1][0]) < 1e-5
    assert relative(passes[0][1], passes[1][1]) < 1e-4


def test_at_the_start_of_a_stage_it_was_what_it_was() -> None:
    wrapped = add_adapter(tiny_model(), PREFIX, TaskType.CAUSAL_LM).eval()
    use_flat_attention(wrapped.get_base_model())
    part = answer_stream([[5, 6]], [[7, 2]], CPU)
    with torch.no_grad():
        began = answer_statistics(wrapped.get_base_model(), part).logprobs
        wrapped.prompt_encoder["default"].embedding.weight.add_(0.5)
        assert relative(answer_statistics(wrapped.get_base_model(), part).logprobs, began) > 1e-3
        with at_start(wrapped) as reference:
            close(answer_statistics(reference, part).logprobs, began)


@pytest.mark.parametrize(("architecture", "batch_size"), [*((name, 4) for name in ARCHITECTURES), ("llama", 2)])
def test_answers_follow_the_prefix(architecture: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers of prompts of several lengths, against the likeliest next token of the whole row each time.

    In a batch of two, prompts enter behind others, and columns are dropped.
    """
    monkeypatch.setattr(decoding, "DROPPED", 1)
    wrapped = _wrapped(architecture)
    base = wrapped.get_base_model()
    prompts = [[5, 6, 7], [9, 4, 4, 8, 8, 8, 1], [5, 6, 7], [3]]
    answers = generate(base, prompts, max_new_tokens=6, end_ids=[2], batch_size=batch_size)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = list(prompt)
        with torch.no_grad():
            for token in answer:
                states = trunk_states(base.base_model, stream([row], CPU))
                assert int(base.lm_head(states[-1]).argmax()) == token
                row.append(token)


def test_a_prefix_is_never_left_out_in_silence() -> None:
    """Where prompts are read padded, or attention has windows, nobody would put it in front."""
    base = _wrapped().get_base_model()
    base.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="a prefix needs full attention"):
        generate(base, [[5, 6, 7]], max_new_tokens=2, end_ids=[2], batch_size=1)
    windowed = _wrapped("mistral", sliding_window=8)
    install_causal(windowed.get_base_model())
    with pytest.raises(ModelError, match="a prefix needs full attention"):
        windowed(**padded([([5, 6], [7, 2])]).arguments(), fused_lm_head=True)
    low = _wrapped().get_base_model().to(torch.bfloat16)  # the prefix stays in float32
    assert all(generate(low, [[5, 6, 7], [3]], max_new_tokens=4, end_ids=[2], batch_size=2))


def _saved(folder: Path, base: Lineage) -> tuple[list[torch.Tensor], Lineage]:
    model = _start(base, PREFIX)
    model.prompt_encoder["default"].embedding.weight.data.normal_(std=0.5)
    spec = tiny_spec(folder, SftConfig(adapter=PREFIX))
    saved = lineage(spec, publish_tiny(spec, model, base))
    with torch.no_grad():
        return _ours(model), saved


def test_it_is_found_again_by_us_and_by_peft(tmp_path: Path, base: Lineage) -> None:
    expected, saved = _saved(tmp_path, base)
    again = load_policy(saved, torch.float32)
    use_flat_attention(again)
    rows = stream(ROWS[:1], CPU)
    with torch.no_grad():
        close(again.lm_head(trunk_states(again.base_model, rows)), expected[0], rtol=1e-5, atol=1e-5)
        plain = PeftModel.from_pretrained(load_policy(base, torch.float32), str(saved.adapters[0].path))
        close(plain(input_ids=torch.tensor(ROWS[:1])).logits[0], expected[0], rtol=1e-4, atol=1e-4)


def test_it_is_continued_and_nothing_is_put_on_it(tmp_path: Path, base: Lineage) -> None:
    expected, saved = _saved(tmp_path, base)
    continued = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=5, chain=CONTINUE)
    model = _start(saved, continued)
    with torch.no_grad():
        close(torch.cat(_ours(model)), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [
        model.prompt_encoder["default"].embedding.weight.shape
    ]
    for other in (LORA, AdapterConfig(rank=4, chain=Chain.stack), PREFIX):
        _refused(saved, other, "starts from a prefix")
    longer = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=6, chain=CONTINUE)
    _refused(saved, longer, r"adapter\.virtual_tokens: the adapter to continue has 5")
