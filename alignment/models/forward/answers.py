"""Prompts with their answers as one stream, and the outputs of policies, value and reward models for the answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.forward.flat import trunk_states
from alignment.models.forward.head import TokenStatistics, label_statistics, scalar_at
from alignment.models.forward.rows import SHORTEST_SHARED, FlatRows, by_tokens, on_host, sent, stream


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerStream:
    """Prompt + answer rows without padding. ``indices`` are the indices in the stream of the states that predict each
    answer token, ``labels`` the tokens, and ``lengths`` each answer's number of tokens. Example: prompt ``[5 6]`` and
    answer ``[7 2]`` give indices ``[1 2]`` and labels ``[7 2]``. Answers to one prompt share its tokens in the
    stream."""

    rows: FlatRows
    indices: Tensor
    labels: Tensor
    lengths: tuple[int, ...]


def answer_stream(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device
) -> AnswerStream:
    """Appends each answer to its prompt. Neither may be empty."""
    rows = stream([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)], device)
    (index,) = on_host(rows.index)
    predicting = [
        index[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    labels = torch.tensor([token for answer in answers for token in answer])
    return AnswerStream(
        rows=rows,
        lengths=tuple(len(answer) for answer in answers),
        **sent({"indices": torch.cat(predicting), "labels": labels}, device),
    )


def batches(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, tokens: int, device: torch.device
) -> Iterator[AnswerStream]:
    """Yields the rows in order, as streams of at most ``tokens`` tokens."""
    for span in micro_batches_of(zip(prompts, answers, strict=True), tokens=tokens):
        yield answer_stream(prompts[span.start : span.stop], answers[span.start : span.stop], device)


def micro_batches_of(rows: Iterable[Sequence[Sequence[int]]], *, tokens: int) -> list[range]:
    """Ranges of rows, each a prompt and an answer, that make streams of at most ``tokens``. A prompt that follows an
    equal one costs no tokens."""
    alone: list[int] = []
    behind: list[int] = []
    before: Sequence[int] = ()
    for prompt, answer in rows:
        alone.append(len(prompt) + len(answer))
        shared = prompt == before and len(prompt) >= SHORTEST_SHARED
        behind.append(len(answer) if shared else alone[-1])
        before = prompt
    return by_tokens(alone, tokens, behind=behind)


def answer_statistics(model: PreTrainedModel, batch: AnswerStream, *, temperature: float = 1.0) -> TokenStatistics:
    """Log-probabilities and entropies of the answer tokens; ``model`` is a causal language model without wrappers.
    Raises ModelError: its head does more than one matrix product and a factor."""
    return statistics_of(model, answer_states(model, batch), batch, temperature=temperature)


def answer_states(model: PreTrainedModel, batch: AnswerStream) -> Tensor:
    """``[answer tokens, width]`` states that predict the answer tokens."""
    return trunk_states(model.base_model, batch.rows)[batch.indices]


def statistics_of(
    model: PreTrainedModel, states: Tensor, batch: AnswerStream, *, temperature: float, entropy_gradient: bool = False
) -> TokenStatistics:
    """Statistics of the answer tokens by the model's head, from their ``answer_states``. Raises ModelError: the head
    does more than one matrix product and a factor."""
    return label_statistics(model, states, batch.labels, temperature=temperature, entropy_gradient=entropy_gradient)


def answer_values(model: PreTrainedModel, batch: AnswerStream) -> Tensor:
    """``[answer tokens]`` values before each token is emitted."""
    return scalar_at(model, batch.rows, batch.indices)


def scalar_scores(model: PreTrainedModel, rows: FlatRows) -> Tensor:
    """``[rows]`` scores at each row's last token; ``model`` may be wrapped by PEFT."""
    return scalar_at(unwrapped(model), rows, rows.ends)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
