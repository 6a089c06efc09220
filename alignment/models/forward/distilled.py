"""The fast forward of a student that is compared with its teacher at the learned positions of a batch."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from alignment.core.errors import ModelError
from alignment.models.forward.causal import IGNORED
from alignment.models.forward.divergence import Teaching, divergence_from
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import logit_cap, scales_logits
from alignment.models.forward.rows import FlatRows, flatten
from alignment.models.forward.transfer import on_device, on_host


def install_divergence(model: PreTrainedModel) -> None:
    """Lets a call ``model(rows=…, indices=…, teaching=…, temperature=…)`` compute a ``Divergence``, as a tuple.

    Other calls are unchanged. A trainer reaches a model through wrappers, which have to see a call.
    """
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
    """Checks that the distributions of both models can be compared.

    Raises:
        ModelError: a head does more than one matrix product, or they have other numbers of tokens.
    """
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
