"""Batched answers with a key-value cache: greedy, or pure ancestral sampling at a temperature.

No top-k, top-p or repetition penalty can leak in from a model's generation config. Sampling inverts the cumulative
distribution at one uniform number a row and step, drawn beforehand: the same seed gives the same answers whatever the
batch size and whichever rows have finished. Finished rows leave the batch, and the cache with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Ancestral sampling: ``uniforms [prompts, steps]`` in [0, 1), float64, one number a prompt and step."""

    temperature: float
    uniforms: Tensor


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answers to ``prompts`` (token ids), in their order; an answer ends with one of ``end_ids`` or at the limit.

    Without ``sampling`` the likeliest token is taken. ``progress`` is told how many prompts are done.

    Raises:
        ValueError: an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt has no token")
    answers: list[list[int]] = [[] for _ in prompts]
    # Similar lengths together, so that little is computed on padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        found = _generate_batch(
            model,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            end_ids=frozenset(end_ids),
            temperature=1.0 if sampling is None else sampling.temperature,
            uniforms=None if sampling is None else sampling.uniforms[batch],
        )
        for index, answer in zip(batch, found, strict=True):
            answers[index] = answer
        if progress is not None:
            progress(start + len(batch))
    return answers


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: frozenset[int],
    temperature: float,
    uniforms: Tensor | None,  # [rows, steps]
) -> list[list[int]]:
    device = model.device
    ids, mask = _left_pad(prompts, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = torch.arange(len(prompts), device=device)
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
        )
        logits = output.logits[:, -1].float()
        if uniforms is None:
            tokens = logits.argmax(-1)
        else:
            tokens = _sample(logits / temperature, uniforms[alive.cpu(), step].to(device))
        chosen = tokens.tolist()
        for row, token in zip(alive.tolist(), chosen, strict=True):
            answers[row].append(token)
        going = torch.tensor([token not in end_ids for token in chosen], device=device)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            cache.batch_select_indices(going.nonzero().flatten())
            alive, mask, positions, tokens = alive[going], mask[going], positions[going], tokens[going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=-1)
        positions = positions[:, -1:] + 1
    return answers


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """``[rows]`` tokens: the first whose cumulative probability exceeds the row's uniform number."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _left_pad(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
