"""TRL's current SFT, reward, DPO and KTO trainers on rows that are tokens already, with their defaults or tuned."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from benchmarks.contestants.training import lora_of, model_of, tokenizer_of, without_casts
from benchmarks.measure import Steps, matmul_peak, write_result
from benchmarks.setting import BETA, LEARNING_RATE, MAX_GRAD_NORM, ROWS, SEED, read_json


class TokenizedDpoTrainer(DPOTrainer):
    """TRL's trainer, spared its tokenisation: all contestants see the same token ids."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class TokenizedKtoTrainer(KTOTrainer):
    """The same for KTO."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset


class Clock(TrainerCallback):
    """Tells ``Steps`` of each logged step; the trainer's closing summary is not one."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Logging reads the loss, so the step has been computed."""
        if logs and "loss" in logs:
            self._steps.ended(float(logs["loss"]))


def main(task_file: Path) -> None:
    """Trains and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(task, folder)
        trainer.add_callback(Clock(steps))
        tuned = task["contestant"] == "trl_tuned"
        with without_casts(task, trainer.model) if tuned else nullcontext():
            trainer.train()
    write_result(Path(task["result"]), peak=peak, seconds=steps.seconds, losses=steps.losses)


def _trainer(task: dict[str, Any], folder: str) -> Any:
    tokenizer = tokenizer_of(task)
    shared = {
        "model": model_of(task, tokenizer),
        "train_dataset": Dataset.from_list(_rows(task)),
        "processing_class": tokenizer,
        "peft_config": lora_of(task),
    }
    told = _arguments(task, folder)
    if task["kind"] == "reward":
        return RewardTrainer(args=RewardConfig(**told, max_length=None), **shared)
    if task["kind"] == "dpo":
        return TokenizedDpoTrainer(args=DPOConfig(**told, max_length=None, beta=BETA), **shared)
    if task["kind"] == "kto":
        return TokenizedKtoTrainer(args=KTOConfig(**told, max_length=None, beta=BETA), **shared)
    # Rows are short enough already, and padding-free rows may not be cut.
    packed = task["contestant"] == "trl_tuned"
    return SFTTrainer(args=SFTConfig(**told, max_length=None, padding_free=packed), **shared)


def _arguments(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """The setting and silence; all else stays as TRL has it, but for what ``trl_tuned`` is allowed."""
    told = {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS,
        "max_steps": task["steps"],
        "learning_rate": LEARNING_RATE[task["adapter"]],
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),  # without it the default of bf16 is refused
    }
    return told | ({"gradient_checkpointing": False} if task["contestant"] == "trl_tuned" else {})


def _rows(task: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_json(Path(task["tokens"]))
    if task["kind"] == "sft":
        return rows
    if task["kind"] == "reward":
        return [
            {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]}
            for row in rows
        ]
    if task["kind"] == "kto":
        names = ("prompt", "completion", "KL_completion")
        return [{"label": row["label"]} | {f"{name}_ids": row[name] for name in names} for row in rows]
    return [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
