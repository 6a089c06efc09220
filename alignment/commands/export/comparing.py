"""Compares two models by their log-probabilities on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config.model import Dtype
from alignment.core.errors import ModelError
from alignment.models.assembly.load import products_in
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import trunk_states, use_flat_attention
from alignment.models.forward.head import capped, logit_cap
from alignment.models.forward.rows import stream

CPU = torch.device("cpu")
RELOADED = 1e-4
"""Maximum difference of log-probabilities after a reload: equal weights, but computed by other code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """The difference of two models on the same rows: mean KL per token from the first, and the largest change of a
    log-probability, both in nats."""

    mean_kl: float
    largest: float


def gap_between(before: Tensor, after: Tensor) -> Gap:
    """The gap between ``[tokens, vocabulary]`` log-probabilities."""
    kl = (before.exp() * (before - after)).sum(-1)
    return Gap(mean_kl=float(kl.mean()), largest=float((before - after).abs().max()))


@torch.no_grad()
def logprobs(model: Any, rows: Sequence[list[int]], dtype: Dtype | None = None) -> Tensor:
    """``[tokens, vocabulary]`` of concatenated rows; ``dtype`` is that of products with float32 factors."""
    of_rows = []
    for row in rows:
        if dtype is None:
            logits = model(input_ids=torch.tensor([row])).logits[0]
        else:
            with products_in(dtype, CPU):
                logits = unwrapped(model)(input_ids=torch.tensor([row])).logits[0]
        of_rows.append(logits.float().log_softmax(-1))
    return torch.cat(of_rows)


def logprobs_of_answers(
    model: Any, prompts: Sequence[list[int]], answers: Sequence[Sequence[int]]
) -> list[list[float]]:
    """The log-probability of each token of each answer behind its prompt, in nats, by the model's own forward."""
    of_answers = []
    for prompt, answer in zip(prompts, answers, strict=True):
        of_row = logprobs(model, [[*prompt, *answer]])[len(prompt) - 1 : -1]
        of_answers.append(of_row.gather(1, torch.tensor(answer, dtype=torch.long)[:, None])[:, 0].tolist())
    return of_answers


@torch.no_grad()
def stream_logprobs(model: PreTrainedModel, rows: Sequence[list[int]]) -> Tensor:
    """The same by the flat forward, which supports a prefix."""
    use_flat_attention(model)
    states = [trunk_states(model.base_model, stream([row], CPU)) for row in rows]
    logits = capped(model.get_output_embeddings()(torch.cat(states)), logit_cap(model))
    return logits.float().log_softmax(-1)


def refuse_differences(actual: Tensor, expected: Tensor, folder: Path) -> None:
    """Outputs after a reload must be those from before.

    Raises:
        ModelError: they differ by more than ``RELOADED``.
    """
    worst = float((actual - expected).abs().max())
    if worst > RELOADED:
        raise ModelError(
            f"the outputs of the written model differ by {worst:.3g} from the expected ones; nothing was exported",
            where=str(folder),
        )
