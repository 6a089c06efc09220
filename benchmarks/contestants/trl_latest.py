"""TRL's current SFT, reward, DPO and KTO trainers on rows that are tokens already, with any setting of their grid."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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

from benchmarks.contestants.training import (
    input_casts,
    lora_of,
    model_of,
    tokenizer_of,
    uses_autocast,
)
from benchmarks.contestants.update_clock import UpdateClock
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


def main(task_file: Path) -> None:
    """Trains and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    steps = Steps(task["warm_up"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(task, folder)
        trainer.add_callback(UpdateClock(steps, loss="loss"))
        with input_casts(task, trainer.model):
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
    arguments = _arguments(task, folder)
    if task["kind"] == "reward":
        return RewardTrainer(args=RewardConfig(**arguments, max_length=None), **shared)
    if task["kind"] == "dpo":
        return TokenizedDpoTrainer(args=DPOConfig(**arguments, max_length=None, beta=BETA), **shared)
    if task["kind"] == "kto":
        return TokenizedKtoTrainer(args=KTOConfig(**arguments, max_length=None, beta=BETA), **shared)
    # Rows are short enough already, and padding-free rows may not be cut.
    padding_free = task["setting"]["padding_free"]
    return SFTTrainer(args=SFTConfig(**arguments, max_length=None, padding_free=padding_free), **shared)


def _arguments(task: dict[str, Any], folder: str) -> dict[str, Any]:
    """The setting, the order of rows, and silence; all else stays as TRL has it."""
    setting = task["setting"]
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting["micro_rows"],
        "gradient_accumulation_steps": ROWS // setting["micro_rows"],
        "gradient_checkpointing": setting["checkpointing"],
        "bf16": uses_autocast(task),
        "train_sampling_strategy": "sequential",  # so that a step has the same rows as everyone's
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
