"""The held-out loss of what a stage handed on, computed by the definition of its objective, one row at a time."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import lineage, load_policy
from tests.oracles.logprobs import log_softmax


def held_out_rows(spec: StageSpec) -> list[dict[str, Any]]:
    """The rows that the stage says it held out."""
    listed = (spec.artifact / "validation_rows.jsonl").read_text().splitlines()
    every = spec.data_path.read_text().splitlines()
    return [json.loads(every[int(json.loads(line)["where"].rpartition(":")[2]) - 1]) for line in listed]


def logprobs(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each token of an answer, one row at a time in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].tolist()
    return [log_softmax(logits[len(prompt) + i - 1])[token] for i, token in enumerate(answer)]


def ids(tokenizer: Any, turns: list[dict[str, str]], answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, ready for an answer, and of the answer with the end of its turn."""
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    encoded = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{answer}<|im_end|>"))
    return tuple(encoded)  # type: ignore[return-value]


def handed_on_policy(spec: StageSpec) -> Any:
    """The stage's result with its adapters merged, in float64."""
    return load_policy(lineage(spec, StageInput(ref=f"stage:{spec.stage}", path=spec.artifact)), torch.float64).eval()


def by_hand(spec: StageSpec, rows: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Loss and accuracy of what the stage handed on, by the definition of its objective."""
    kind: Any = spec.config.kind
    tokenizer = load_tokenizer(spec.base_path, None)
    if kind == "sft":
        model = handed_on_policy(spec)
        every = [
            logprob
            for row in rows
            for logprob in logprobs(model, *ids(tokenizer, row["messages"][:-1], row["messages"][-1]["content"]))
        ]
        return -math.fsum(every) / len(every), None
    margins = (_reward_margins if kind == "reward" else _dpo_margins)(spec, tokenizer, rows)
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    return math.fsum(losses) / len(losses), sum(margin > 0 for margin in margins) / len(margins)


def _dpo_margins(spec: StageSpec, tokenizer: Any, rows: list[dict[str, Any]]) -> list[float]:
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder).double().eval()
        for folder in (spec.artifact / "model", spec.base_path)
    )
    margins = []
    for row in rows:
        chosen, rejected = (
            math.fsum(logprobs(policy, *tokens)) - math.fsum(logprobs(reference, *tokens))
            for tokens in (ids(tokenizer, row["messages"], row[side]) for side in ("chosen", "rejected"))
        )
        margins.append(0.1 * (chosen - rejected))
    return margins


def _reward_margins(spec: StageSpec, tokenizer: Any, rows: list[dict[str, Any]]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(spec.artifact / "model", num_labels=1).double().eval()
    head = load_file(spec.artifact / "head.safetensors")["weight"].double()

    def score(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            return float((model.model(torch.tensor([prompt + answer])).last_hidden_state[0, -1] @ head.T).sum())

    sides = ("chosen", "rejected")
    scores = [[score(*ids(tokenizer, row["messages"], row[side])) for side in sides] for row in rows]
    return [chosen - rejected for chosen, rejected in scores]
