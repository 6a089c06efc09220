"""PPO of TRL 1.12.0 (``trl.experimental.ppo``), in an environment of its own."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.contestants.training import with_adapter
from benchmarks.contestants.update_clock import UpdateClock
from benchmarks.measure import Steps, matmul_peak, write_result
from benchmarks.setting import (
    LEARNING_RATE,
    LORA,
    MAX_GRAD_NORM,
    PPO_EPOCHS,
    PPO_NEW_TOKENS,
    PROMPTS,
    SEED,
    read_json,
)


def main(task_file: Path) -> None:
    """Makes the updates and writes the result."""
    task = read_json(task_file)
    peak = matmul_peak()
    steps, counted = Steps(task["warm_up"]), _count_answers()
    clock = UpdateClock(steps, loss="loss/policy_avg")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(task, folder)
        trainer.add_callback(clock)
        trainer.train()
    batches = PROMPTS // task["setting"]["rollout_rows"]
    answers = [sum(counted[first : first + batches]) for first in range(0, len(counted), batches)]
    measured = answers[task["warm_up"] : task["steps"]]
    write_result(
        Path(task["result"]),
        peak=peak,
        seconds=steps.seconds,
        losses=[],
        updates=clock.updates,
        answer_tokens=sum(measured) / len(measured),
    )


def _count_answers() -> list[int]:
    """Real answer tokens of each batch of a rollout, noted where TRL cuts answers at their end."""
    counted: list[int] = []
    cut = ppo_trainer.truncate_response

    def truncate_response(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> Any:
        truncated = cut(stop_token_id, pad_token_id, responses)
        counted.append(int((truncated != pad_token_id).sum()))
        return truncated

    ppo_trainer.truncate_response = truncate_response
    return counted


def _trainer(task: dict[str, Any], folder: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(task["base"], padding_side="left")
    tokenizer.pad_token = tokenizer.unk_token  # TRL takes the pad token for the end of an answer
    full = task["adapter"] == "full"
    policy = _language_model(task)
    reference = _language_model(task) if full else None
    value, reward = (_scorer(task, tokenizer) for _ in range(2))
    if task["setting"]["critic"] == "lora":
        value = with_adapter(value)
    if task["setting"]["checkpointing"]:
        for model in (policy, value):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    rows = Dataset.from_list([{"input_ids": ids} for ids in read_json(Path(task["tokens"]))])
    trainer = PPOTrainer(
        args=_arguments(task, folder),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=None if full else LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    # In the order of the rows, so that an update has the same prompts as everyone's.
    in_order = DataLoader(rows, batch_size=PROMPTS, collate_fn=trainer.data_collator)
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    return trainer


def _language_model(task: dict[str, Any]) -> Any:
    attention = task["setting"]["attention"]
    return AutoModelForCausalLM.from_pretrained(task["base"], dtype=torch.bfloat16, attn_implementation=attention)


def _scorer(task: dict[str, Any], tokenizer: Any) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(
        task["reward_folder"],
        dtype=torch.bfloat16,
        num_labels=1,
        attn_implementation=task["setting"]["attention"],
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _arguments(task: dict[str, Any], folder: str) -> PPOConfig:
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=task["setting"]["micro_rows"],
        gradient_accumulation_steps=PROMPTS // task["setting"]["micro_rows"],
        local_rollout_forward_batch_size=task["setting"]["rollout_rows"],
        num_mini_batches=1,
        num_ppo_epochs=PPO_EPOCHS,
        total_episodes=PROMPTS * task["steps"],
        response_length=PPO_NEW_TOKENS,
        temperature=1.0,
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=LEARNING_RATE[task["adapter"]],
        max_grad_norm=MAX_GRAD_NORM,
        num_sample_generations=0,
        seed=SEED,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # without it the default of bf16 is refused
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
