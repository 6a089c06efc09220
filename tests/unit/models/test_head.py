"""Log-probabilities and divergences in chunks equal the slow loops of the papers, and so do their gradients."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.models.forward import head
from alignment.models.forward.divergence import Divergence, Teaching, divergence_from
from alignment.models.forward.head import TokenStatistics, label_statistics
from tests.oracles import distillation
from tests.oracles import logprobs as slow_logprobs
from tests.oracles.close import close


@pytest.fixture
def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=rng), torch.randn(VOCABULARY, 5, generator=rng)
    labels = torch.randint(0, VOCABULARY, (7,), generator=rng)
    labels[0] = (hidden[0] @ weight.T).argmax()
    return hidden, weight, labels


def token_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, cap: float | None = None, **options: Any
) -> TokenStatistics:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=cap))
    head = SimpleNamespace(weight=weight, bias=None)
    model: Any = SimpleNamespace(config=config, get_output_embeddings=lambda: head)
    return label_statistics(model, hidden, labels, **options)


def bounded(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("chunk", "at_once"), [(1, 512), (3, 2), (512, 3), (512, 512)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_statistics_equal_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch,
    numbers: tuple[torch.Tensor, ...],
    cap: float | None,
    temperature: float,
    chunk: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "IN_CACHE", at_once * VOCABULARY)
    hidden, weight, labels = numbers
    logits = bounded(hidden.double() @ weight.double().T, cap).tolist()
    statistics = token_statistics(hidden, weight, labels, temperature=temperature, cap=cap)
    pairs = list(zip(logits, labels.tolist(), strict=True))
    logprobs = [slow_logprobs.log_softmax(row, temperature=temperature)[label] for row, label in pairs]
    close(statistics.logprobs, logprobs, atol=1e-6)
    close(statistics.entropy, [slow_logprobs.entropy(row, temperature=temperature) for row, _ in pairs], atol=1e-6)
    close(statistics.mean_logits, [sum(row) / len(row) / temperature for row, _ in pairs], atol=1e-6)
    assert statistics.is_top1.tolist() == [slow_logprobs.is_likeliest(row, label) for row, label in pairs]
    assert statistics.is_top1[0]


@pytest.mark.parametrize("cap", [None, 1.5])
def test_of_tied_tokens_only_the_one_that_greedy_decoding_takes_is_the_first_choice(cap: float | None) -> None:
    weight = torch.zeros(VOCABULARY, 2)
    weight[[3, 7, 9]] = 1.0
    statistics = token_statistics(torch.ones(VOCABULARY, 2), weight, torch.arange(VOCABULARY), cap=cap)
    assert statistics.is_top1.nonzero().flatten().tolist() == [3]


def test_chunks_on_two_threads_give_the_same_statistics_and_gradients(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[torch.Tensor, ...]
) -> None:
    monkeypatch.setattr(head, "CHUNK", 2)
    hidden, weight, labels = numbers
    names: list[str] = []
    project = head.ChunkMemory.project

    def watched(self: head.ChunkMemory, *arguments: torch.Tensor) -> torch.Tensor:
        names.append(threading.current_thread().name.split("_")[0])
        return project(self, *arguments)

    monkeypatch.setattr(head.ChunkMemory, "project", watched)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        states = hidden.clone().requires_grad_()
        statistics = token_statistics(states, weight, labels)
        (statistics.logprobs * torch.arange(7)).sum().backward()
        hits = statistics.is_top1.float()
        results.append((statistics.logprobs, statistics.entropy, statistics.mean_logits, hits, states.grad))
    assert names == ["MainThread"] * 4 + ["part"] * 4
    for alone, shared in zip(*results, strict=True):
        close(shared, alone, atol=1e-6)


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("of_entropy", [True, False], ids=["entropy", "log-probability"])
def test_gradients_are_those_of_the_whole_distribution(
    monkeypatch: pytest.MonkeyPatch,
    numbers: tuple[torch.Tensor, ...],
    cap: float | None,
    temperature: float,
    trained: bool,
    of_entropy: bool,
) -> None:
    """Of log-probability and entropy, each with weights of its own; of the entropy only if a loss asks for it."""
    monkeypatch.setattr(head, "CHUNK", 3)
    monkeypatch.setattr(head, "IN_CACHE", 2 * VOCABULARY)
    hidden, weight, labels = numbers
    upstream = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    exact_inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    statistics = token_statistics(*inputs, labels, temperature=temperature, entropy_gradient=of_entropy, cap=cap)
    assert statistics.entropy.requires_grad is of_entropy
    assert not statistics.mean_logits.requires_grad
    plain = (bounded(exact_inputs[0] @ exact_inputs[1].T, cap) / temperature).log_softmax(-1)
    entropy = -(plain.exp() * plain).sum(-1)
    loss, expected = statistics.logprobs * upstream[0], plain.gather(-1, labels[:, None]).squeeze(-1) * upstream[0]
    if of_entropy:
        loss, expected = loss + statistics.entropy * upstream[1], expected + entropy * upstream[1]
    loss.sum().backward()
    expected.sum().backward()
    assert (inputs[1].grad is not None) is trained
    for tensor, exact in zip(inputs, exact_inputs, strict=True):
        if tensor.requires_grad:
            close(tensor.grad, exact.grad, atol=1e-5)


VOCABULARY = 11


@dataclass
class Heads:
    states: Tensor
    weight: Tensor
    teaching: Teaching

    @classmethod
    def drawn(cls) -> Heads:
        rng = torch.Generator().manual_seed(0)
        sizes = ((7, 5), (VOCABULARY, 5), (7, 4), (VOCABULARY, 4))
        states, weight, *of_teacher = (torch.randn(size, generator=rng).requires_grad_() for size in sizes)
        return cls(states, nn.Parameter(weight.detach()), Teaching(states=of_teacher[0], weight=of_teacher[1]))

    def logits(self) -> tuple[list[list[float]], list[list[float]]]:
        teacher = self.teaching.states.double() @ self.teaching.weight.double().T
        return teacher.tolist(), (self.states.double() @ self.weight.double().T).tolist()

    def divergence(self, *, temperature: float = 1.0) -> Divergence:
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=False)
        head.weight = self.weight  # type: ignore[assignment]
        model: Any = SimpleNamespace(get_output_embeddings=lambda: head)
        return divergence_from(model, self.states, self.teaching, temperature=temperature)


@pytest.fixture
def heads() -> Heads:
    return Heads.drawn()


@pytest.mark.parametrize(("chunk", "at_once"), [(1, 512), (3, 2), (512, 512)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergence_and_acceptance_equal_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch, heads: Heads, temperature: float, chunk: int, at_once: int
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "IN_CACHE", at_once * VOCABULARY)
    computed = heads.divergence(temperature=temperature)
    pairs = list(zip(*heads.logits(), strict=True))
    close(computed.forward_kl.detach(), [distillation.forward_kl(*pair, temperature) for pair in pairs], atol=1e-6)
    close(computed.acceptance, [distillation.acceptance(*pair, temperature) for pair in pairs], atol=1e-6)
    same = [teacher.index(max(teacher)) == student.index(max(student)) for teacher, student in pairs]
    assert computed.is_same_top.tolist() == same
    assert not computed.acceptance.requires_grad


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_student_alone_has_the_gradient_of_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch, heads: Heads, temperature: float, trained: bool
) -> None:
    monkeypatch.setattr(head, "CHUNK", 3)
    monkeypatch.setattr(head, "IN_CACHE", 2 * VOCABULARY)
    upstream = torch.randn(7, generator=torch.Generator().manual_seed(1))
    heads.weight.requires_grad_(trained)
    (heads.divergence(temperature=temperature).forward_kl * upstream).sum().backward()
    slopes = [distillation.slopes(*pair, temperature) for pair in zip(*heads.logits(), strict=True)]
    of_logits = torch.tensor(slopes).double() * upstream[:, None]
    close(heads.states.grad, of_logits @ heads.weight.detach().double(), atol=1e-5)
    if trained:
        close(heads.weight.grad, of_logits.T @ heads.states.detach().double(), atol=1e-5)
    else:
        assert heads.weight.grad is None
    assert heads.teaching.states.grad is heads.teaching.weight.grad is None
