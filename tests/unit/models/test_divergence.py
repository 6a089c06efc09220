"""A student's divergence from its teacher in chunks equals the slow loops of the papers, and so does its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alignment.models.forward import head_chunks
from alignment.models.forward.divergence import Divergence, Teaching, divergence_from
from tests.oracles import distillation as oracle
from tests.oracles.close import close

VOCABULARY = 11


@dataclass
class Heads:
    """Hidden states and heads of a student of width 5 and a teacher of width 4, for 7 tokens."""

    states: Tensor
    weight: Tensor
    teaching: Teaching

    def logits(self) -> tuple[list[list[float]], list[list[float]]]:
        teacher = self.teaching.states.double() @ self.teaching.weight.double().T
        return teacher.tolist(), (self.states.double() @ self.weight.double().T).tolist()

    def divergence(self, *, temperature: float = 1.0) -> Divergence:
        return divergence_from(Headed(self.weight), self.states, self.teaching, temperature=temperature)  # type: ignore[arg-type]


class Headed:
    """A model of which only the head is read."""

    def __init__(self, weight: Tensor) -> None:
        self._head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self._head.weight = weight  # type: ignore[assignment]

    def get_output_embeddings(self) -> Any:
        return self._head


@pytest.fixture
def heads() -> Heads:
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return Heads(
        states=random(7, 5).requires_grad_(),
        weight=nn.Parameter(random(VOCABULARY, 5)),
        teaching=Teaching(states=random(7, 4), weight=random(VOCABULARY, 4)),
    )


@pytest.mark.parametrize(("chunk", "at_once"), [(1, 512), (3, 2), (7, 1), (512, 512)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_divergence_and_acceptance_equal_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch, heads: Heads, temperature: float, chunk: int, at_once: int
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK", chunk)
    monkeypatch.setattr(head_chunks, "IN_CACHE", at_once * VOCABULARY)
    computed = heads.divergence(temperature=temperature)
    pairs = list(zip(*heads.logits(), strict=True))
    close(computed.forward_kl.detach(), [oracle.forward_kl(*pair, temperature) for pair in pairs], atol=1e-6)
    close(computed.acceptance, [oracle.acceptance(*pair, temperature) for pair in pairs], atol=1e-6)
    same = [teacher.index(max(teacher)) == student.index(max(student)) for teacher, student in pairs]
    assert computed.is_same_top.tolist() == same
    assert float(computed.forward_kl.detach().min()) > 0


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_slow_loops(
    monkeypatch: pytest.MonkeyPatch, heads: Heads, temperature: float, trained: bool
) -> None:
    monkeypatch.setattr(head_chunks, "CHUNK", 3)
    monkeypatch.setattr(head_chunks, "IN_CACHE", 2 * VOCABULARY)
    upstream = torch.randn(7, generator=torch.Generator().manual_seed(1))
    heads.weight.requires_grad_(trained)
    (heads.divergence(temperature=temperature).forward_kl * upstream).sum().backward()
    of_logits = torch.tensor([oracle.slopes(*pair, temperature) for pair in zip(*heads.logits(), strict=True)])
    of_logits = of_logits.double() * upstream[:, None]
    close(heads.states.grad, of_logits @ heads.weight.detach().double(), atol=1e-5)
    if trained:
        close(heads.weight.grad, of_logits.T @ heads.states.detach().double(), atol=1e-5)
    else:
        assert heads.weight.grad is None


def test_nothing_is_learned_by_the_teacher(heads: Heads) -> None:
    heads.teaching.states.requires_grad_()
    heads.teaching.weight.requires_grad_()
    heads.divergence().forward_kl.sum().backward()
    assert heads.teaching.states.grad is None
    assert heads.teaching.weight.grad is None


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_and_is_always_accepted(
    heads: Heads, trained: bool
) -> None:
    """Exactly, because both sides compute the same numbers."""
    heads.weight.requires_grad_(trained)
    heads.teaching = Teaching(states=heads.states.detach().clone(), weight=heads.weight.detach().clone())
    computed = heads.divergence(temperature=0.7)
    assert computed.forward_kl.tolist() == [0.0] * 7
    close(computed.acceptance, [1.0] * 7, atol=1e-6)
    assert bool(computed.is_same_top.all())
    computed.forward_kl.sum().backward()
    assert heads.states.grad is not None
    assert float(heads.states.grad.abs().max()) == 0.0


def test_only_the_divergence_carries_a_gradient(heads: Heads) -> None:
    computed = heads.divergence()
    assert computed.forward_kl.requires_grad
    assert not computed.acceptance.requires_grad


def test_tokens_that_the_teacher_never_says_cost_nothing_and_stay_finite() -> None:
    teaching = Teaching(states=torch.tensor([[1.0]]), weight=torch.tensor([[1e4], [-1e4]]))
    student = Heads(torch.tensor([[1.0]]), nn.Parameter(torch.tensor([[0.0], [0.0]])), teaching)
    close(student.divergence().forward_kl.detach(), [0.6931472])
    close(student.divergence().acceptance, [0.5])


def test_no_token_at_all_has_no_divergence(heads: Heads) -> None:
    """A process may be left with a micro-batch of which nothing is learned."""
    heads.states = torch.zeros(0, 5, requires_grad=True)
    heads.teaching = Teaching(states=torch.zeros(0, 4), weight=heads.teaching.weight)
    computed = heads.divergence()
    assert computed.forward_kl.shape == (0,)
    computed.forward_kl.sum().backward()
