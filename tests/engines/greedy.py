"""Greedy answers of the shipped model to held-out prompts in float32, and how those of another engine differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.turns import Message
from alignment.models.forward.generate import generate

HELD_OUT = Path(__file__).parents[2] / "data" / "quickstart" / "heldout.jsonl"
PROMPTS, TOKENS = 100, 32
SHARE = 0.98
"""Of the prompts, at least so many have equal answers."""
GAP = 1e-3
"""Logits that are closer than this in float64 may come out in either order in float32."""

Ids = list[int]


def held_out_prompts(tokenizer: Any) -> list[Ids]:
    """Prompts of the quickstart's held-out data, as a policy is asked them."""
    rows = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()[:PROMPTS]]
    return [prompt_ids(tokenizer, [Message(**turn) for turn in row]) for row in rows]


def stop_ids(tokenizer: Any) -> Ids:
    """The tokens that end an answer."""
    return sorted(end_ids(tokenizer))


def our_answers(model: Any, tokenizer: Any, prompts: Sequence[Ids]) -> list[Ids]:
    """Ours, with the token that ends them."""
    return generate(model, prompts, max_new_tokens=TOKENS, end_ids=stop_ids(tokenizer), batch_size=16)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first tokens in which two answers to a prompt differ. ``gap`` is how far apart the logits of the two are in
    float64, and ``others`` how far the likeliest token is ahead of the more likely of the two: 0 if it is one of
    them."""

    prompt: int
    position: int
    tokens: tuple[str, str]
    gap: float
    others: float

    def __str__(self) -> str:
        here, there = self.tokens
        return (
            f"prompt {self.prompt}, token {self.position}: {here!r} here, {there!r} there; their logits differ by "
            f"{self.gap:.1e}, and the likeliest token is ahead of them by {self.others:.1e}"
        )


def differences(
    model: Any, tokenizer: Any, prompts: Sequence[Ids], ours: Sequence[Ids], of_engine: Sequence[Ids]
) -> list[Difference]:
    """One for each prompt whose answers differ; ``model`` becomes float64 for the time of this call."""
    differing = []
    dtype = model.dtype
    model.double()
    for number, (prompt, own, other) in enumerate(zip(prompts, ours, of_engine, strict=True)):
        if own == other:
            continue
        position = next(at for at, (own_id, other_id) in enumerate(zip(own, other, strict=False)) if own_id != other_id)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + own[:position]], device=model.device)).logits[0, -1]
        of_both = logits[[own[position], other[position]]]
        differing.append(
            Difference(
                prompt=number,
                position=position,
                tokens=tuple(tokenizer.convert_ids_to_tokens([own[position], other[position]])),
                gap=float((of_both[0] - of_both[1]).abs()),
                others=float(logits.max() - of_both.max()),
            )
        )
    model.to(dtype)
    return differing


def report(engine: str, differing: Sequence[Difference], *, asked: int) -> None:
    """Prints how many answers of those to ``asked`` prompts are equal, and each that is not."""
    print(f"\n{engine}: {asked - len(differing)} of {asked} answers of {TOKENS} tokens are equal", *differing, sep="\n")
