"""Plain transformers and PEFT with a loop of one's own: padded batch, textbook losses, no checkpointing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional

from benchmarks.contestants.training import lora_of, model_of, tokenizer_of, without_casts
from benchmarks.measure import Steps, device, matmul_peak, write_result
from benchmarks.setting import BETA, LEARNING_RATE, MAX_GRAD_NORM, read_json

IGNORED = -100


def main(task_file: Path) -> None:
    """Trains and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    tokenizer = tokenizer_of(task)
    model = model_of(task, tokenizer)
    lora = lora_of(task)
    if lora is not None:
        model = get_peft_model(model, lora)
    rows = read_json(Path(task["tokens"]))
    loss_of = {"sft": _sft_loss, "reward": _reward_loss, "dpo": _dpo_loss, "kto": _kto_loss}[task["kind"]]
    steps = Steps()
    with without_casts(task, model):
        _train(model.train(), lambda: loss_of(model, rows, tokenizer.pad_token_id), task, steps)
    write_result(Path(task["result"]), peak=peak, seconds=steps.seconds, losses=steps.losses)


def _train(model: Any, loss_of_step: Callable[[], Tensor], task: dict[str, Any], steps: Steps) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE[task["adapter"]], weight_decay=0.0, fused=True)
    for _ in range(task["steps"]):
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss = loss_of_step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        steps.ended(loss.item())


def _sft_loss(model: Any, rows: list[dict[str, list[int]]], pad: int) -> Tensor:
    ids, real = _padded([row["input_ids"] for row in rows], pad)
    labels, _ = _padded([row["labels"] for row in rows], IGNORED)
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _reward_loss(model: Any, rows: list[dict[str, list[int]]], pad: int) -> Tensor:
    ids, real, _ = _both(rows, pad)
    chosen, rejected = model(input_ids=ids, attention_mask=real).logits.float().squeeze(-1).chunk(2)
    return -functional.logsigmoid(chosen - rejected).mean()


def _dpo_loss(model: Any, rows: list[dict[str, list[int]]], pad: int) -> Tensor:
    ids, real, labels = _both(rows, pad)
    policy = _answer_logprobs(model, ids, real, labels)
    with torch.no_grad(), model.disable_adapter():
        reference = _answer_logprobs(model, ids, real, labels)
    chosen, rejected = (policy - reference).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _kto_loss(model: Any, rows: list[dict[str, Any]], pad: int) -> Tensor:
    answers, mismatched = (_answers(rows, name, pad) for name in ("completion", "KL_completion"))
    with torch.no_grad():
        others = _answer_logprobs(model, *mismatched)
        with model.disable_adapter():
            divergence = (others - _answer_logprobs(model, *mismatched)).mean().clamp(min=0)
            reference = _answer_logprobs(model, *answers)
    ratios = _answer_logprobs(model, *answers) - reference
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=ratios.device)
    return (1 - torch.sigmoid(BETA * signs * (ratios - divergence))).mean()


def _answers(rows: list[dict[str, Any]], name: str, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with these answers: ids, which are real, and labels of the answers."""
    ids, real = _padded([row["prompt"] + row[name] for row in rows], pad)
    labels, _ = _padded([[IGNORED] * len(row["prompt"]) + row[name] for row in rows], IGNORED)
    return ids, real, labels


def _answer_logprobs(model: Any, ids: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """``[sequences]`` sums over answer tokens, nats."""
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    labels = labels[:, 1:]
    counted = labels != IGNORED
    each = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (each * counted).sum(-1)


def _both(rows: list[dict[str, list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen sequences, then rejected ones: ids, which are real, and labels of the answers."""
    parts = [(row["prompt"], row[answer]) for answer in ("chosen", "rejected") for row in rows]
    ids, real = _padded([prompt + answer for prompt, answer in parts], pad)
    labels, _ = _padded([[IGNORED] * len(prompt) + answer for prompt, answer in parts], IGNORED)
    return ids, real, labels


def _padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """``[rows, longest]`` values, and 1 where they are real."""
    longest = max(len(row) for row in rows)
    values = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device())
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device())
    return values, real


if __name__ == "__main__":
    main(Path(sys.argv[1]))
