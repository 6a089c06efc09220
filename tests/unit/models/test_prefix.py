"""Prefix tuning on the stream says what PEFT's own forward says, learns the same, and samples by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PeftModelForCausalLM, TaskType

from alignment.config.adapter import CONTINUE, AdapterConfig, AdapterKind, Chain
from alignment.config.model import Dtype
from alignment.core.errors import ConfigError, ModelError
from alignment.models.assembly.adapters import add_adapter, at_start
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.start import load_start
from alignment.models.forward import decoding_rows
from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.attention import ATTENTION
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.generate import generate
from alignment.models.forward.rows import stream
from alignment.stages.sft.config import SftConfig
from tests.oracles.close import close
from tests.tiny import ARCHITECTURES, publish_tiny, tiny_model, tiny_spec
from tests.unit.models.conftest import CPU, LORA, padded, relative

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
    rows = stream(ROWS, CPU)
    logits = base.lm_head(trunk_states(base.base_model, rows))
    return [logits[rows.index[number, : len(row)]] for number, row in enumerate(ROWS)]


def _pefts(wrapped: Any) -> list[torch.Tensor]:
    """By the forward of PEFT's class, one row at a time, with a cache in front."""
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
    monkeypatch.setattr(decoding_rows, "DROPPED", 1)
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


def _start(start: Lineage, adapter: AdapterConfig) -> Any:
    model = load_start(start, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=CPU).eval()
    use_flat_attention(model.get_base_model())
    return model


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
        with pytest.raises(ConfigError, match="starts from a prefix"):
            _start(saved, other)
    longer = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=6, chain=CONTINUE)
    with pytest.raises(ConfigError, match=r"adapter\.virtual_tokens: the adapter to continue has 5"):
        _start(saved, longer)
