"""Log-probabilities in chunks equal the slow loops, and their gradient the finite difference."""

from __future__ import annotations

import threading

import pytest
import torch

from alignment.models.forward import head_chunks
from alignment.models.forward.head import token_statistics
from tests.oracles import logprobs as oracle
from tests.oracles.close import close


@pytest.fixture
def figures() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head and labels: 7 tokens, width 5, vocabulary 11."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 5, generator=rng), torch.randn(11, 5, generator=rng)
    labels = torch.randint(0, 11, (7,), generator=rng)
    labels[0] = (hidden[0] @ weight.T).argmax()
    return hidden, weight, labels


def bounded(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """c·tanh(z / c)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


@pytest.mark.parametrize(("chunk", "at_once"), [(1, 512), (3, 512), (3, 2), (7, 1), (512, 3), (512, 512)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_statistics_equal_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch,
    figures: tuple[torch.Tensor, ...],
    cap: float | None,
    temperature: float,
    chunk: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK", chunk)
    monkeypatch.setattr(head_chunks, "IN_CACHE", at_once * 11)
    hidden, weight, labels = figures
    logits = bounded(hidden.double() @ weight.double().T, cap).tolist()
    statistics = token_statistics(hidden, weight, labels, temperature=temperature, cap=cap)
    pairs = list(zip(logits, labels.tolist(), strict=True))
    close(
        statistics.logprobs,
        [oracle.log_softmax(row, temperature=temperature)[label] for row, label in pairs],
        atol=1e-6,
    )
    close(statistics.entropy, [oracle.entropy(row, temperature=temperature) for row, _ in pairs], atol=1e-6)
    close(statistics.mean_logits, [sum(row) / len(row) / temperature for row, _ in pairs], atol=1e-6)
    assert statistics.is_top1.tolist() == [oracle.is_likeliest(row, label) for row, label in pairs]
    assert statistics.is_top1[0]


@pytest.mark.parametrize("cap", [None, 1.5])
def test_of_tied_tokens_only_the_one_that_greedy_decoding_takes_is_the_first_choice(cap: float | None) -> None:
    weight = torch.zeros(11, 2)
    weight[[3, 7, 9]] = 1.0
    labels = torch.arange(11)
    statistics = token_statistics(torch.ones(11, 2), weight, labels, cap=cap)
    logits = bounded(torch.ones(2) @ weight.T, cap).tolist()
    assert statistics.is_top1.tolist() == [oracle.is_likeliest(logits, label) for label in labels.tolist()]
    assert statistics.is_top1.nonzero().flatten().tolist() == [3]


def test_chunks_on_two_threads_give_the_same_statistics_and_gradients(
    monkeypatch: pytest.MonkeyPatch, figures: tuple[torch.Tensor, ...]
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK", 2)
    hidden, weight, labels = figures
    names: list[str] = []
    project = head_chunks.ChunkMemory.project

    def watched(self: head_chunks.ChunkMemory, *arguments: torch.Tensor) -> torch.Tensor:
        names.append(threading.current_thread().name.split("_")[0])
        return project(self, *arguments)

    monkeypatch.setattr(head_chunks.ChunkMemory, "project", watched)
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
def test_gradients_equal_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
    figures: tuple[torch.Tensor, ...],
    cap: float | None,
    temperature: float,
    trained: bool,
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK", 3)
    monkeypatch.setattr(head_chunks, "IN_CACHE", 2 * 11)
    hidden, weight, labels = figures
    upstream = torch.randn(7, generator=torch.Generator().manual_seed(1))
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    exact_inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    (token_statistics(*inputs, labels, temperature=temperature, cap=cap).logprobs * upstream).sum().backward()
    logits = bounded(exact_inputs[0] @ exact_inputs[1].T, cap)
    plain = (logits / temperature).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    (plain * upstream).sum().backward()
    for tensor, exact in zip(inputs, exact_inputs, strict=True):
        if tensor.requires_grad:
            close(tensor.grad, exact.grad, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_an_entropy_has_the_gradient_of_the_whole_distributions_entropy(
    monkeypatch: pytest.MonkeyPatch,
    figures: tuple[torch.Tensor, ...],
    cap: float | None,
    temperature: float,
    trained: bool,
) -> None:
    """Together with that of the log-probability, each with weights of its own."""
    monkeypatch.setattr(head_chunks, "CHUNK", 3)
    monkeypatch.setattr(head_chunks, "IN_CACHE", 2 * 11)
    hidden, weight, labels = figures
    upstream = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    exact_inputs = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    statistics = token_statistics(*inputs, labels, temperature=temperature, entropy_gradient=True, cap=cap)
    (statistics.logprobs * upstream[0] + statistics.entropy * upstream[1]).sum().backward()
    plain = (bounded(exact_inputs[0] @ exact_inputs[1].T, cap) / temperature).log_softmax(-1)
    entropy = -(plain.exp() * plain).sum(-1)
    (plain.gather(-1, labels[:, None]).squeeze(-1) * upstream[0] + entropy * upstream[1]).sum().backward()
    close(statistics.entropy.detach(), entropy.detach(), atol=1e-6)
    for tensor, exact in zip(inputs, exact_inputs, strict=True):
        if tensor.requires_grad:
            close(tensor.grad, exact.grad, atol=1e-5)


def test_a_frozen_head_gets_no_gradient(figures: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels = figures
    hidden = hidden.clone().requires_grad_()
    token_statistics(hidden, weight, labels).logprobs.sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_statistics_other_than_logprobs_carry_no_gradient(figures: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels = figures
    statistics = token_statistics(hidden.clone().requires_grad_(), weight, labels)
    assert statistics.logprobs.requires_grad
    assert not statistics.entropy.requires_grad
    assert not statistics.mean_logits.requires_grad


def test_huge_logits_stay_finite() -> None:
    statistics = token_statistics(torch.tensor([[1e4], [-1e4]]), torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    close(statistics.logprobs, [0.0, -2e4])
    close(statistics.entropy, [0.0, 0.0])
