"""Twenty optimiser steps give the same losses whichever way a batch is laid out, in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from alignment.models.forward.answers import answer_statistics, answer_stream
from alignment.models.forward.causal import install_causal
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.rows import stream
from tests.tiny import ARCHITECTURES, tiny_model
from tests.unit.models.conftest import IGNORED, ROWS, padded, plain, twin

STEPS = 20
TOLERANCE = 5e-5  # a step's losses agree within 1e-5 (test_forward.py); twenty steps of momentum carry rounding on
BATCHES = [ROWS["pairs of one prompt"], ROWS["ragged"], ROWS["answers to one prompt"], ROWS["one-token completions"]]
Rows = list[tuple[list[int], list[int]]]
Loss = Callable[[PreTrainedModel, Rows], torch.Tensor]


def _padded(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    return model(**padded(rows, side="left", extra=1).arguments(), fused_lm_head=True).loss


def _packed(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    ids = torch.tensor([[token for prompt, answer in rows for token in (*prompt, *answer)]])
    positions = torch.cat([torch.arange(len(prompt) + len(answer)) for prompt, answer in rows])[None]
    labels = torch.tensor([[token for prompt, answer in rows for token in ([IGNORED] * len(prompt) + answer)]])
    return model(input_ids=ids, position_ids=positions, labels=labels, fused_lm_head=True).loss


def _shared(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    prompts, answers = zip(*rows, strict=True)
    part = answer_stream(prompts, answers, torch.device("cpu"))
    apart = sum(len(prompt) + len(answer) for prompt, answer in rows)
    assert (len(part.rows.input_ids) < apart) == (len(set(map(tuple, prompts))) < len(prompts))
    return -answer_statistics(model, part).logprobs.mean()


def _unshared(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    prompts, answers = zip(*rows, strict=True)
    part = answer_stream(prompts, answers, torch.device("cpu"))
    together = [[*prompt, *answer] for prompt, answer in rows]
    alone = stream(together, torch.device("cpu"), share=False)
    indices = [alone.index[row, len(prompt) - 1 : len(together[row]) - 1] for row, prompt in enumerate(prompts)]
    part = type(part)(rows=alone, indices=torch.cat(indices), labels=part.labels, lengths=part.lengths)
    return -answer_statistics(model, part).logprobs.mean()


def _losses(model: PreTrainedModel, loss_of: Loss) -> list[float]:
    # Adam would blow up the rounding of gradients that are nearly zero to steps of full size.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, BATCHES[step % len(BATCHES)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_packed_and_prefix_shared_batches_learn_alike(architecture: str) -> None:
    expected = _losses(twin(tiny_model(architecture)), lambda model, rows: plain(model, padded(rows)).loss)
    assert expected[-len(BATCHES)] < 0.7 * expected[0]
    for loss_of in (_padded, _packed):
        model = tiny_model(architecture)
        install_causal(model)
        assert _losses(model, loss_of) == pytest.approx(expected, rel=TOLERANCE), loss_of.__name__
    for loss_of in (_shared, _unshared):
        model = tiny_model(architecture)
        use_flat_attention(model)
        assert _losses(model, loss_of) == pytest.approx(expected, rel=TOLERANCE), loss_of.__name__
