"""Divergences between a teacher and a student, and the student's forward pass."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.models.assembly.modules import products_dtype
from alignment.models.forward.causal import IGNORED
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import ChunkMemory, chunks_of, logit_cap, scales_logits, through_head
from alignment.models.forward.rows import FlatRows, flatten, on_device, on_host


@dataclass(frozen=True, kw_only=True, slots=True)
class Teaching:
    """What a teacher says at some positions: hidden ``states [tokens, width]``, and its head's ``weight``. Student and
    teacher have the same vocabulary; their widths may differ."""

    states: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Of the student from the teacher at each position, ``[tokens]``. ``forward_kl`` carries gradients for the student
    (nats). ``acceptance`` is Σ min(p, q), and ``is_same_top`` says whether both find the same token most likely."""

    forward_kl: Tensor
    acceptance: Tensor
    is_same_top: Tensor


def divergence_from(
    student: PreTrainedModel, states: Tensor, teaching: Teaching, *, temperature: float = 1.0
) -> Divergence:
    """The divergence of the student, given its hidden ``states [tokens, width]``, under its own head. Logits of both
    are divided by ``temperature``."""
    fields = through_head(
        student,
        states,
        lambda hidden, weight: _ChunkedDivergence.apply(hidden, weight, teaching.states, teaching.weight, temperature),
    )
    return Divergence(forward_kl=fields[0], acceptance=fields[1], is_same_top=fields[2])


class _ChunkedDivergence(torch.autograd.Function):
    """``[tokens]`` divergences, acceptances and agreements. The gradient in the student's logits is (q − p) /
    temperature. With a frozen head its part of the backward pass is done while a chunk's probabilities are in memory.
    The gradient of a trained head mixes the factors of all tokens, so the probabilities are computed again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, teacher_states: Tensor, teacher_weight: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        compute, dtypes = products_dtype(weight), (hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(compute), weight.to(compute)
        taught = products_dtype(teacher_weight)
        teacher_states, teacher_weight = teacher_states.to(taught), teacher_weight.to(taught)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(hidden) if want_hidden and not want_weight else None
        chunks = _Chunks(hidden, weight, teacher_states, teacher_weight, temperature)
        count = hidden.shape[0]
        forward_kl, acceptance = hidden.new_empty(2, count, dtype=torch.float32)
        is_same_top = hidden.new_empty(count, dtype=torch.bool)
        for chunk in chunks_of(count):
            num_products = len(chunks.project(chunk))
            for rows, products, log_q, log_p in chunks.log_shares(chunk):
                is_same_top[rows] = log_q.argmax(-1) == log_p.argmax(-1)
                q, p = chunks.shares(log_q, log_p)
                forward_kl[rows] = log_p.sub_(log_q).mul_(p).sum(-1)
                acceptance[rows] = torch.minimum(q, p, out=log_q).sum(-1)
                if slopes is not None:
                    products.copy_(q.sub_(p))
            if slopes is not None:
                slopes[chunk] = chunks.project_back(num_products)
        if want_weight:
            ctx.save_for_backward(hidden, weight, teacher_states, teacher_weight)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.recomputes, ctx.temperature, ctx.input_dtypes = want_weight, temperature, dtypes
        ctx.mark_non_differentiable(acceptance, is_same_top)
        return forward_kl, acceptance, is_same_top

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factors = (grad / ctx.temperature).float()
        if ctx.recomputes:
            return *_recomputed(ctx, factors), None, None, None
        (slopes,) = ctx.saved_tensors
        return (slopes * factors[:, None]).to(ctx.input_dtypes[0]), None, None, None, None


class _Chunks:
    def __init__(
        self, hidden: Tensor, weight: Tensor, teacher_states: Tensor, teacher_weight: Tensor, temperature: float
    ) -> None:
        self._student, self._teacher = (hidden, weight), (teacher_states, teacher_weight)
        self._memory = ChunkMemory(hidden, weight)
        self._teacher_memory = ChunkMemory(teacher_states, teacher_weight)
        self._temperature = temperature

    def project(self, chunk: slice) -> Tensor:
        states, weight = self._teacher
        self._teacher_memory.project(states[chunk], weight)
        hidden, weight = self._student
        return self._memory.project(hidden[chunk], weight)

    def log_shares(self, chunk: slice) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        both = zip(self._memory.parts(chunk), self._teacher_memory.parts(chunk), strict=True)
        for (rows, products), (_, teacher_products) in both:
            log_q = _log_softmax(self._memory, products, self._temperature)
            yield rows, products, log_q, _log_softmax(self._teacher_memory, teacher_products, self._temperature)

    def shares(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return (
            torch.exp(log_q, out=self._memory.shares[: len(log_q)]),
            torch.exp(log_p, out=self._teacher_memory.shares[: len(log_p)]),
        )

    def project_back(self, count: int) -> Tensor:
        return self._memory.project_back(count, self._student[1])


def _log_softmax(memory: ChunkMemory, products: Tensor, temperature: float) -> Tensor:
    logits = memory.logits[: len(products)].copy_(products)
    if temperature != 1.0:
        logits.div_(temperature)
    logits.sub_(logits.amax(-1, keepdim=True))
    return logits.sub_(torch.exp(logits, out=memory.shares[: len(products)]).sum(-1, keepdim=True).log())


def _recomputed(ctx: Any, factors: Tensor) -> tuple[Tensor | None, Tensor]:
    hidden, weight, teacher_states, teacher_weight = ctx.saved_tensors
    chunks = _Chunks(hidden, weight, teacher_states, teacher_weight, ctx.temperature)
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    for chunk in chunks_of(hidden.shape[0]):
        slopes = chunks.project(chunk)
        for rows, products, log_q, log_p in chunks.log_shares(chunk):
            q, p = chunks.shares(log_q, log_p)
            products.copy_(q.sub_(p).mul_(factors[rows, None]))
        if grad_hidden is not None:
            grad_hidden[chunk] = chunks.project_back(len(slopes))
        grad_weight += slopes.T @ hidden[chunk]
    hidden_dtype, weight_dtype = ctx.input_dtypes
    return None if grad_hidden is None else grad_hidden.to(hidden_dtype), grad_weight.to(weight_dtype)


def install_divergence(model: PreTrainedModel) -> None:
    """Lets a call ``model(rows=…, indices=…, teaching=…, temperature=…)`` compute a ``Divergence``, as a tuple. Other
    calls are unchanged. A trainer reaches a model through wrappers, which have to see a call."""
    use_flat_attention(model)
    otherwise = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        rows: FlatRows | None = None,
        indices: Tensor | None = None,
        teaching: Teaching | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if rows is None or teaching is None:
            return otherwise(*args, **kwargs)
        states = trunk_states(self.base_model, rows)[indices]
        divergence = divergence_from(self, states, teaching, temperature=temperature)
        return divergence.forward_kl, divergence.acceptance, divergence.is_same_top

    model.forward = types.MethodType(forward, model)


def learned_positions(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[FlatRows, Tensor]:
    """The stream of a padded batch, and the indices in it of the states that predict a token with a label."""
    rows = flatten(input_ids, attention_mask)
    given, is_real, index = on_host(labels, rows.is_real, rows.index)
    predicts = (given[:, 1:] != IGNORED) & is_real[:, 1:]  # the state at column c predicts column c + 1
    return rows, on_device(index[:, :-1][predicts], labels.device)


def teaching_at(teacher: PreTrainedModel, rows: FlatRows, indices: Tensor) -> Teaching:
    """What the teacher says at these indices of the stream; call it without gradients."""
    states = trunk_states(teacher.base_model, rows)[indices]
    return Teaching(states=states, weight=teacher.get_output_embeddings().weight)


def refuse_other_heads(student: PreTrainedModel, teacher: PreTrainedModel, *, where: str) -> None:
    """Checks that the distributions of both models can be compared. Raises ModelError: a head does more than one matrix
    product, or they have other numbers of tokens."""
    for name, model in (("student", student), ("teacher", teacher)):
        if scales_logits(model) or logit_cap(model) is not None:
            raise ModelError(
                f"the {name}, a {type(model).__name__}, scales or caps its logits, or adds a bias to them",
                where=where,
                remedy="use a model without these; or use SFT on rows from a `sample` stage, which works with any "
                "model",
            )
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the student's head has {sizes[0]} tokens and the teacher's {sizes[1]}",
            where=where,
            remedy="use models of the same family with heads of the same size, or use the teacher's first layers",
        )
