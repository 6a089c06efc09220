"""Batches with every awkward shape, the plain transformers forward that ours must equal, and one thread a test."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TaskType
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignment.config.model import AdapterConfig, AdapterKind
from alignment.models.assembly.adapters import add_adapter
from alignment.models.assembly.load import Lineage
from tests.tiny import BASE_SOURCE, liven, save_tiny_model

CPU = torch.device("cpu")
LORA = AdapterConfig(rank=4)
FULL = AdapterConfig(kind=AdapterKind.full)
DORA = AdapterConfig(kind=AdapterKind.dora, rank=4)
QLORA = AdapterConfig(kind=AdapterKind.qlora, rank=4)
KINDS = pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
PAD = 2
"""Equal to EOS, and a common token inside prompts as well."""
IGNORED = -100
_LONG = [3, 9, 2, 7, 5, 5, 2, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 2]
_OTHER = [4, 9, 2, 7, 5, 5, 2, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": PAD,
}
"""Arguments of configurations of transformers that most architectures have in common."""
PROMPTS = [[5, 9, 2, 7], [8], [3, 2, 2, 6, 4, 9, 2, 11], [40, 41], [17, 18, 19, 20, 21]]
ROWS: dict[str, list[tuple[list[int], list[int]]]] = {
    "ragged": [([5, 9, 2, 7], [11, 12, 2]), ([8], [13, 2]), ([3, 2, 2, 6, 4, 9, 2], [14, 15, 16, 17, 2])],
    "one row": [([5, 9, 2, 7], [11, 12, 2])],
    "one-token completions": [([5, 6, 7], [2]), ([9, 2], [2]), ([4, 4, 4, 4, 4], [30])],
    "prompt that ends with pad": [([5, 6, 2], [9, 2]), ([2, 2], [2, 2, 2])],
    "equal lengths": [([5, 6, 2], [9, 2]), ([7, 8], [10, 11, 2])],
    "no end": [([5, 6], [40, 41, 42, 43]), ([2], [44])],
    "pairs of one prompt": [(_LONG, [7, 8, 2]), (_OTHER, [2]), (_LONG, [7, 9, 10, 2]), (_OTHER, [5, 6, 2])],
    "answers to one prompt": [(_LONG, [7, 2]), (_LONG, [8, 9, 2]), (_LONG, [7, 2]), (_LONG, [7, 10])],
    "a row inside another": [(_LONG, [7, 8, 9, 2]), (_LONG, [7, 8]), ([*_LONG, 7, 8, 9, 2], [5, 2])],
    "turns of one conversation": [(_LONG, [7, 2]), ([*_LONG, 7, 2, *_OTHER], [9, 2]), ([*_LONG, 7, 2, *_OTHER], [8])],
}
"""The last four have beginnings in common that are long enough to be computed once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Padded:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}


def padded(rows: list[tuple[list[int], list[int]]], *, side: str = "right", extra: int = 0) -> Padded:
    width = max(len(prompt) + len(answer) for prompt, answer in rows) + extra
    columns: tuple[list[list[int]], ...] = ([], [], [])
    for prompt, answer in rows:
        length = len(prompt) + len(answer)
        filled = ([*prompt, *answer], [1] * length, [IGNORED] * len(prompt) + answer)
        for column, values, filler in zip(columns, filled, (PAD, 0, IGNORED), strict=True):
            padding = [filler] * (width - length)
            column.append(padding + values if side == "left" else values + padding)
    ids, mask, labels = (torch.tensor(column) for column in columns)
    return Padded(input_ids=ids, attention_mask=mask, labels=labels)


def packed(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    labels = [token for prompt, answer in rows for token in [IGNORED] * len(prompt) + answer]
    positions = [torch.arange(len(prompt) + len(answer)) for prompt, answer in rows]
    return {
        "input_ids": torch.tensor([[token for prompt, answer in rows for token in prompt + answer]]),
        "position_ids": torch.cat(positions)[None],
        "labels": torch.tensor([labels]),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    logprobs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    loss: Tensor


def plain(model: PreTrainedModel, batch: Padded, *, temperature: float = 1.0) -> Expected:
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions)
    wanted = batch.labels[:, 1:] != IGNORED
    logits = output.logits[:, :-1][wanted].float() / temperature
    labels = batch.labels[:, 1:][wanted]
    distribution = logits.log_softmax(-1)
    logprobs = distribution.gather(-1, labels[:, None]).squeeze(-1)
    return Expected(
        logprobs=logprobs,
        entropy=-(distribution.exp() * distribution).sum(-1),
        mean_logits=logits.mean(-1),
        is_top1=logits.argmax(-1) == labels,
        loss=-logprobs.sum() / len(labels),
    )


def twin(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    for module in other.modules():
        vars(module).pop("forward", None)
    inner = other.get_base_model() if hasattr(other, "get_base_model") else other
    inner.set_attn_implementation("eager")
    return other


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], *, limit: int, ends: Collection[int] = (PAD,)) -> list[int]:
    answer: list[int] = []
    while len(answer) < limit and (not answer or answer[-1] not in ends):
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    by_name = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert by_name
    return by_name


def relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_same_gradients(model: torch.nn.Module, other: torch.nn.Module, tolerance: float = 1e-5) -> None:
    own, expected = gradients(model), gradients(other)
    assert own.keys() == expected.keys()
    for name, gradient in own.items():
        assert relative(gradient, expected[name]) < tolerance, name


def assert_same_statistics(output: Any, expected: Expected) -> None:
    mask = output.label_mask
    for name in ("logprobs", "entropy", "mean_logits"):
        statistic = getattr(output, "log_probs" if name == "logprobs" else name)
        assert relative(statistic[mask], getattr(expected, name)) < 1e-5, name
        assert statistic[~mask].abs().sum() == 0, name
    assert torch.equal(output.is_top1[mask], expected.is_top1)
    assert relative(output.loss, expected.loss) < 1e-5


def assert_learns_alike(model: Any, reference: Any, batch: Padded, arguments: dict[str, Tensor] | None = None) -> None:
    output = model(**(batch.arguments() if arguments is None else arguments), fused_lm_head=True)
    expected = plain(reference, batch)
    assert_same_statistics(output, expected)
    output.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, reference)


def adapted(model: Any, adapter: AdapterConfig, task: TaskType = TaskType.CAUSAL_LM) -> Any:
    wrapped = add_adapter(model, adapter, task)
    liven(wrapped)
    return wrapped


@pytest.fixture
def base(tmp_path: Path) -> Lineage:
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(tmp_path / "base"), adapters=())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
