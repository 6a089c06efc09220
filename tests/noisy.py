"""A stage that over-fits: its held-out loss falls and then rises; and that loss by the definition of its objective."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment import worker
from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.optim import Schedule
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import lineage, load_policy
from alignment.training.context import StageContext
from tests.chained import Chained, config_of
from tests.oracles.logprobs import log_softmax

ROWS = 17
HELD_OUT = ValidationConfig(share=0.3, every=2, keep_best=True)
"""Five of 17 prompts: a number that two processes cannot share evenly."""
STEPS = {"sft": 16, "reward": 10, "dpo": 10}
RATES = {"sft": 1e-2, "reward": 1e-2, "dpo": 3e-3}


def noise(kind: str, *, rows: int = ROWS, first: int = 0) -> list[dict[str, Any]]:
    """Rows of a kind of stage that ask for different words, from ``first`` on, and answer with random letters."""
    rng = random.Random(1 + first)

    def word() -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(4, 12)))

    asked = [[{"role": "user", "content": f"Word {number}?"}] for number in range(first, first + rows)]
    if kind == "sft":
        return [{"messages": [*turns, {"role": "assistant", "content": word()}]} for turns in asked]
    return [{"messages": turns, "chosen": word(), "rejected": word()} for turns in asked]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overfitting(
    chained: Chained,
    kind: str,
    adapter: AdapterConfig,
    validation: ValidationConfig = HELD_OUT,
    *,
    max_steps: int | None = None,
    rate: float | None = None,
    rows: int = ROWS,
    **changes: Any,
) -> StageSpec:
    """The stage in the folder of ``chained``, in which it has not run yet; ``changes`` are those of its settings."""
    config: Any = config_of(kind, adapter)
    optim = replace(
        config.optim, lr=rate or RATES[kind], schedule=Schedule.constant, max_steps=max_steps or STEPS[kind]
    )
    config = replace(config, data=DataConfig(), optim=optim, validation=validation, **{"save_every": 3, **changes})
    path = write_rows(chained.folder / f"{kind}.jsonl", noise(kind, rows=rows))
    return replace(chained.spec(kind, adapter, config=config), data_path=path)


def ran(spec: StageSpec) -> list[dict[str, float]]:
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return lines(spec)


def lines(spec: StageSpec) -> list[dict[str, float]]:
    return [json.loads(line) for line in (spec.artifact / "metrics.jsonl").read_text().splitlines()]


def manifest(spec: StageSpec) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((spec.artifact / "manifest.json").read_text())["metrics"]
    return metrics


def held_out_losses(rows: list[dict[str, float]]) -> dict[int, float]:
    return {int(row["step"]): row["validation/loss"] for row in rows if "validation/loss" in row}


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
