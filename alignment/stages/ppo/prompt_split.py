"""Tokenises the prompts of a stage, and splits them into prompts to learn from and held-out prompts for the guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.core.errors import ConfigError
from alignment.data.records import Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import PROMPTS
from alignment.models.assembly.prefix import refuse_too_long
from alignment.models.forward.answers import unwrapped
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.shared.stage_rows import fitting
from alignment.training.context import StageContext
from alignment.training.rl.rollouts import Prompts


def tokenized_prompts(
    config: PpoConfig, context: StageContext, tokenizer: Any, rows: list[Prompt]
) -> tuple[Prompts, dict[str, float]]:
    """The prompts within the length limit, and how many rows there were, were too long or were cut."""
    limits = Limits(row=config.max_prompt_length, too_long=config.too_long)
    by_row, counts = fitting(context, PROMPTS, rows, config.data, limits, tokenizer)
    ids = [tokenized.rows[0]["prompt"] for tokenized in by_row.values()]
    return Prompts(ids=ids, rows=list(by_row)), counts


def refuse_long_prompts(config: PpoConfig, policy: PreTrainedModel, prompts: Prompts, rows: Sequence[Prompt]) -> None:
    """Checks that the policy can read each prompt with the longest answer.

    Raises:
        ModelError: it cannot; the error names the longest prompt.
    """
    longest = max(range(len(prompts.ids)), key=lambda number: len(prompts.ids[number]))
    tokens = len(prompts.ids[longest]) + config.max_new_tokens
    refuse_too_long(unwrapped(policy).base_model, tokens, where=rows[prompts.rows[longest]].where)


def hold_out(prompts: Prompts, config: PpoConfig, context: StageContext) -> tuple[Prompts, Prompts]:
    """Prompts to learn from, and held-out prompts for the guard; rows with the same prompt are on the same side.

    Raises:
        ConfigError: there are too few different prompts.
    """
    if not config.guard.every:
        return prompts, Prompts(ids=[], rows=[])
    different = sorted({tuple(prompt) for prompt in prompts.ids})
    number = config.guard.prompts
    if not context.world_size <= number < len(different):
        raise ConfigError(
            f"{number} prompts cannot be held out of {len(different)} with {context.world_size} processes",
            where=f"stages.{context.spec.stage}.guard.prompts",
            remedy=f"choose {context.world_size} to {len(different) - 1}, or set guard.every to 0",
        )
    order = torch.randperm(len(different), generator=context.generator("held out")).tolist()
    chosen = {different[index] for index in order[:number]}
    held_out: dict[tuple[int, ...], int] = {}
    learned = []
    for index, prompt in enumerate(prompts.ids):
        if tuple(prompt) in chosen:
            held_out.setdefault(tuple(prompt), index)
        else:
            learned.append(index)
    return _selected(prompts, learned), _selected(prompts, list(held_out.values()))


def _selected(prompts: Prompts, indices: list[int]) -> Prompts:
    return Prompts(ids=[prompts.ids[index] for index in indices], rows=[prompts.rows[index] for index in indices])
