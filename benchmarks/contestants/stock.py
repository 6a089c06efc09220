"""Plain transformers and PEFT with a loop of one's own and textbook losses, with any setting of its grid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch.nn import functional

from benchmarks.contestants.training import (
    input_casts,
    lora_of,
    model_of,
    tokenizer_of,
    uses_autocast,
)
from benchmarks.measure import Steps, device, matmul_peak, write_result
from benchmarks.setting import BETA, LEARNING_RATE, MAX_GRAD_NORM, ROWS, read_json

IGNORED = -100
Rows = list[dict[str, Any]]


def main(task_file: Path) -> None:
    """Trains and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    tokenizer = tokenizer_of(task)
    model = model_of(task, tokenizer)
    lora = lora_of(task)
    if lora is not None:
        model = get_peft_model(model, lora)
    if task["setting"]["checkpointing"]:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    rows = read_json(Path(task["tokens"]))
    steps = Steps(task["warm_up"])
    with input_casts(task, model):
        train(model, rows, tokenizer.pad_token_id, task, steps)
    write_result(Path(task["result"]), peak=peak, seconds=steps.seconds, losses=steps.losses)


def train(model: Any, rows: Rows, pad: int, task: dict[str, Any], steps: Steps) -> None:
    """A step for each ``ROWS`` rows, in micro-batches whose losses add up to that of the whole batch.

    After the last row come the first again.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE[task["adapter"]], weight_decay=0.0, fused=True)
    loss_of, about_all = _LOSSES[task["kind"]]
    steps.begin()
    for step in range(task["steps"]):
        first = ROWS * step % len(rows)
        batch = _Batch(model, rows[first : first + ROWS], pad, task)
        with batch.precision():
            whole = about_all(batch)
        total = 0.0
        for part in batch.parts():
            with batch.precision():
                loss = loss_of(batch, part, whole)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        steps.ended(total)


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of a step, and how they are computed."""

    model: Any
    rows: Rows
    pad: int
    task: dict[str, Any]

    def parts(self) -> Iterator[Rows]:
        """Its micro-batches."""
        count = self.task["setting"]["micro_rows"]
        return (self.rows[first : first + count] for first in range(0, len(self.rows), count))

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, if the setting has it."""
        return torch.autocast(device().type, dtype=torch.bfloat16) if uses_autocast(self.task) else nullcontext()


# ---- of a whole batch, before its micro-batches ------------------------------------------------------------------


def _number_of_rows(batch: _Batch) -> float:
    return len(batch.rows)


def _number_of_labels(batch: _Batch) -> float:
    return sum(label != IGNORED for row in batch.rows for label in row["labels"][1:])


@torch.no_grad()
def _divergence(batch: _Batch) -> Tensor:
    """The estimate of KTO, from the mismatched answers of the whole batch."""
    total = torch.zeros((), device=device())
    for part in batch.parts():
        mismatched = _answers(part, "KL_completion", batch.pad)
        others = _answer_logprobs(batch.model, *mismatched)
        with batch.model.disable_adapter():
            total += (others - _answer_logprobs(batch.model, *mismatched)).sum()
    return (total / len(batch.rows)).clamp(min=0)


# ---- the share of a micro-batch in the loss ----------------------------------------------------------------------


def _sft_loss(batch: _Batch, rows: Rows, labels_of_all: float) -> Tensor:
    if batch.task["setting"]["padding_free"]:
        labels, inputs = _flat(rows)
    else:
        ids, real = _padded([row["input_ids"] for row in rows], batch.pad)
        labels, _ = _padded([row["labels"] for row in rows], IGNORED)
        inputs = {"input_ids": ids, "attention_mask": real}
    logits = batch.model(**inputs).logits[:, :-1].float()
    total = functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / labels_of_all


def _reward_loss(batch: _Batch, rows: Rows, number_of_rows: float) -> Tensor:
    ids, real, _ = _both(rows, batch.pad)
    chosen, rejected = batch.model(input_ids=ids, attention_mask=real).logits.float().squeeze(-1).chunk(2)
    return -functional.logsigmoid(chosen - rejected).sum() / number_of_rows


def _dpo_loss(batch: _Batch, rows: Rows, number_of_rows: float) -> Tensor:
    sequences = _both(rows, batch.pad)
    policy = _answer_logprobs(batch.model, *sequences)
    with torch.no_grad(), batch.model.disable_adapter():
        reference = _answer_logprobs(batch.model, *sequences)
    chosen, rejected = (policy - reference).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).sum() / number_of_rows


def _kto_loss(batch: _Batch, rows: Rows, divergence: Tensor) -> Tensor:
    answers = _answers(rows, "completion", batch.pad)
    with torch.no_grad(), batch.model.disable_adapter():
        reference = _answer_logprobs(batch.model, *answers)
    ratios = _answer_logprobs(batch.model, *answers) - reference
    signs = torch.tensor([1.0 if row["label"] else -1.0 for row in rows], device=ratios.device)
    return (1 - torch.sigmoid(BETA * signs * (ratios - divergence))).sum() / len(batch.rows)


_LOSSES: dict[str, tuple[Callable[[_Batch, Rows, Any], Tensor], Callable[[_Batch], Any]]] = {
    "sft": (_sft_loss, _number_of_labels),
    "reward": (_reward_loss, _number_of_rows),
    "dpo": (_dpo_loss, _number_of_rows),
    "kto": (_kto_loss, _divergence),
}
"""By kind: the share of a micro-batch in the loss, and what it has to know of the whole batch."""


# ---- tensors -----------------------------------------------------------------------------------------------------


def _answers(rows: Rows, name: str, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with these answers: ids, which are real, and labels of the answers."""
    ids, real = _padded([row["prompt"] + row[name] for row in rows], pad)
    labels, _ = _padded([[IGNORED] * len(row["prompt"]) + row[name] for row in rows], IGNORED)
    return ids, real, labels


def _answer_logprobs(model: Any, ids: Tensor, real: Tensor, labels: Tensor) -> Tensor:
    """``[sequences]`` sums over answer tokens, nats."""
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    labels = labels[:, 1:]
    counted = labels != IGNORED
    scored = logits[counted].float()  # [answer tokens of all sequences, vocabulary]
    each = scored.gather(-1, labels[counted][:, None]).squeeze(-1) - scored.logsumexp(-1)
    return torch.zeros(len(ids), device=ids.device).index_add(0, counted.nonzero()[:, 0], each)


def _both(rows: Rows, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chosen sequences, then rejected ones: ids, which are real, and labels of the answers."""
    parts = [(row["prompt"], row[answer]) for answer in ("chosen", "rejected") for row in rows]
    ids, real = _padded([prompt + answer for prompt, answer in parts], pad)
    labels, _ = _padded([[IGNORED] * len(prompt) + answer for prompt, answer in parts], IGNORED)
    return ids, real, labels


def _flat(rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows one behind another, ``[1, tokens]``: labels, of which the first of each row is ignored, and the inputs.

    Positions begin anew in each row, by which transformers keeps rows apart.
    """
    ids = [token for row in rows for token in row["input_ids"]]
    positions = [position for row in rows for position in range(len(row["input_ids"]))]
    labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
    ids_tensor, positions_tensor, labels_tensor = (
        torch.tensor([values], device=device()) for values in (ids, positions, labels)
    )
    return labels_tensor, {"input_ids": ids_tensor, "position_ids": positions_tensor}


def _padded(rows: list[list[int]], fill: int) -> tuple[Tensor, Tensor]:
    """``[rows, longest]`` values, and 1 where they are real."""
    longest = max(len(row) for row in rows)
    values = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device())
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device())
    return values, real


if __name__ == "__main__":
    main(Path(sys.argv[1]))
