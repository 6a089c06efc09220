"""ORPO beside TRL's own trainer: the odds-ratio term of its loss, batch by batch, on the same rows in the same order.

The other term is not compared. TRL's is over the prompt's tokens as well; ours is over the chosen answer's, as in
Hong et al. 2024, eq. 6.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from alignment.config.optim import OptimConfig, Schedule
from alignment.stages.dpo.config import DpoLoss
from alignment.training.context import StageContext
from tests.chained import FULL, Chained, config_of
from tests.tiny import tiny_tokenizer

STEPS, BATCH = 4, 2
UNMOVED = 1e-12
"""A rate at which no weight moves, so that the other term has no say."""
BETAS = (0.1, 0.6)


def our_losses(folder: Path, beta: float) -> tuple[list[float], Path, list[dict[str, Any]]]:
    """The loss of each step, the base model, and the rows in the order in which they were learned from."""
    chained = Chained(folder)
    optim = OptimConfig(
        lr=UNMOVED, batch_size=BATCH, micro_batch_tokens=60, schedule=Schedule.constant, warmup_ratio=0.0
    )
    config: Any = replace(config_of("dpo", FULL, loss=DpoLoss.orpo, beta=beta), optim=optim)
    lines = chained.run("dpo", FULL, config=config)
    spec = chained.spec("dpo", FULL, config=config)
    rows = [json.loads(line) for line in spec.data_path.read_text().splitlines()][: STEPS * BATCH]
    generator = StageContext(spec=spec, rank=0, world_size=1).generator("order")
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [line["loss"] for line in lines], chained.base, [rows[index] for index in order]


def their_terms(base: Path, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """The mean of log σ(log odds ratio) of each step of TRL's trainer, as a user would call it."""
    tokenizer = tiny_tokenizer()
    texts = [
        {
            "prompt": tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32),
        args=ORPOConfig(
            output_dir=str(folder),
            learning_rate=UNMOVED,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [line["log_odds_ratio"] for line in trainer.state.log_history if "log_odds_ratio" in line]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_odds_ratio_term_is_that_of_trl_s_own_trainer(tmp_path: Path) -> None:
    (small, base, rows), (large, _, same_rows) = (our_losses(tmp_path / str(beta), beta) for beta in BETAS)
    assert rows == same_rows
    terms = [(low - high) / (BETAS[1] - BETAS[0]) for low, high in zip(small, large, strict=True)]
    assert len(set(terms)) == STEPS
    assert terms == pytest.approx(their_terms(base, rows, tmp_path / "trl"), abs=1e-4)
