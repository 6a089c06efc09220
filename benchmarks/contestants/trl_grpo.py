"""TRL's current GRPO trainer on prompts that are tokens already, with any setting of its grid; a rule is the reward."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.contestants.training import lora_of, model_of, tokenizer_of, uses_autocast
from benchmarks.contestants.update_clock import UpdateClock
from benchmarks.measure import Steps, matmul_peak, write_result
from benchmarks.setting import (
    GRPO_BETA,
    GRPO_GROUP,
    GRPO_LENGTH,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    PPO_NEW_TOKENS,
    PROMPTS,
    SEED,
    read_json,
)


class TokenizedGrpoTrainer(GRPOTrainer):
    """TRL's trainer, spared its tokenisation: a prompt is the JSON of its token ids, which all contestants see."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [json.loads(prompt) for prompt in prompts], None, {}


def main(task_file: Path) -> None:
    """Makes the updates and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    steps = Steps(task["warm_up"])
    clock = UpdateClock(steps, loss="loss")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(task, folder)
        trainer.add_callback(clock)
        trainer.train()
    lengths = [update["completions/mean_length"] for update in clock.updates[-len(steps.seconds) :]]
    write_result(
        Path(task["result"]),
        peak=peak,
        seconds=steps.seconds,
        losses=[],
        updates=clock.updates,
        answer_tokens=PROMPTS * sum(lengths) / len(lengths),
    )


def closeness(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The reward: minus the distance of an answer's length from the target, in shares of the target."""
    return [-abs(len(answer) - GRPO_LENGTH) / GRPO_LENGTH for answer in completion_ids]


def _trainer(task: dict[str, Any], folder: str) -> GRPOTrainer:
    tokenizer = tokenizer_of(task)
    return TokenizedGrpoTrainer(
        model=model_of(task, tokenizer),
        reward_funcs=closeness,
        args=_arguments(task, folder),
        train_dataset=Dataset.from_list([{"prompt": json.dumps(ids)} for ids in read_json(Path(task["tokens"]))]),
        processing_class=tokenizer,
        peft_config=lora_of(task),
    )


def _arguments(task: dict[str, Any], folder: str) -> GRPOConfig:
    setting = task["setting"]
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=setting["micro_rows"],
        gradient_accumulation_steps=PROMPTS // setting["micro_rows"],
        gradient_checkpointing=setting["checkpointing"],
        torch_compile=setting["compiled"],
        bf16=uses_autocast(task),
        cache_implementation=None if setting["cache"] == "dynamic" else setting["cache"],
        shuffle_dataset=False,  # so that an update has the same prompts as everyone's
        num_generations=GRPO_GROUP,
        max_completion_length=PPO_NEW_TOKENS,
        temperature=1.0,
        loss_type="grpo",
        beta=GRPO_BETA,
        max_steps=task["steps"],
        learning_rate=LEARNING_RATE[task["adapter"]],
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # without it the default of bf16 is refused
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
