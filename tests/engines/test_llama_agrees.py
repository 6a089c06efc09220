"""Greedy answers of the shipped model to held-out prompts: ours in float32 against llama.cpp's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.commands.export.gguf_form.gguf_file import file_metadata, model_metadata, vocabulary, write_file
from alignment.commands.export.gguf_form.llama_cpp_check import ask
from tests.engines.greedy import TOKENS, stop_ids

pytestmark = pytest.mark.engines

TIE = 0.02
"""Nats by which the likeliest token may be ahead where answers part. llama.cpp multiplies weights in f16 by states that
it rounds to f16, which moves logits by some thousandths."""


@pytest.mark.parametrize(
    ("dtype", "wide_cache", "share"), [("f32", True, 0.97), ("f16", True, 0.94), ("f16", False, 0.94)]
)
def test_answers_agree(
    tmp_path: Path,
    llama_python: Path,
    smollm: tuple[Any, Any],
    prompts: list[list[int]],
    ours: list[list[int]],
    dtype: str,
    wide_cache: bool,
    share: float,
) -> None:
    """Answers may part only where two tokens are nearly equally likely; llama.cpp's usual cache is f16."""
    prompts, ours = prompts[::3], ours[::3]
    policy, tokenizer = smollm
    stops = stop_ids(tokenizer)
    words = vocabulary(tokenizer, policy.config.vocab_size, stops)
    metadata = {**model_metadata(policy.config), **file_metadata(dtype), **words.metadata}
    file = tmp_path / f"model-{dtype}.gguf"
    write_file(file, policy, metadata, dtype)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    request = {"prompts": prompts, "texts": texts, "max_new_tokens": TOKENS, "stops": stops, "wide_cache": wide_cache}
    reply = ask(llama_python, file, **request)
    assert reply["ids"] == prompts, "the texts of all prompts are cut into the tokens of training"
    differences = [
        _difference(index, prompt, answer, other, margins, smollm)
        for index, (prompt, answer, other, margins) in enumerate(
            zip(prompts, ours, reply["answers"], reply["margins"], strict=True)
        )
        if answer != other
    ]
    equal = 1 - len(differences) / len(prompts)
    cache = "f32" if wide_cache else "f16"
    print(f"\n{dtype}, cache {cache}: {equal:.1%} of {len(prompts)} answers of {TOKENS} tokens are equal")
    print(*(difference.text for difference in differences), sep="\n")
    assert equal >= share
    assert all(difference.ahead < TIE for difference in differences)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Where two answers part; ``ahead`` is the larger of the distances by which each side prefers its own token."""

    text: str
    ahead: float


def _difference(
    index: int, prompt: list[int], answer: list[int], other: list[int], margins: list[list[float]], model: Any
) -> Difference:
    at = next(at for at, (own_id, other_id) in enumerate(zip(answer, other, strict=False)) if own_id != other_id)
    with torch.no_grad():
        logits = model[0](input_ids=torch.tensor([prompt + answer[:at]])).logits[0, -1]
    ahead_here = float(logits[answer[at]] - logits[other[at]])
    second, ahead_there = margins[at]
    tokens = model[1].convert_ids_to_tokens([answer[at], other[at], int(second)])
    text = (
        f"prompt {index}, token {at}: {tokens[0]!r} here, {ahead_here:.4f} nats ahead of {tokens[1]!r}; in llama.cpp "
        f"that is {ahead_there:.4f} ahead of {tokens[2]!r}"
    )
    return Difference(text=text, ahead=max(ahead_here, ahead_there))
