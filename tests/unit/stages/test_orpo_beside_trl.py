"""ORPO beside TRL's own trainer: the odds-ratio term of its loss, for each pair of the same rows.

The other term is not compared. TRL's is over the prompt's tokens as well; ours is over the chosen answer's, as in
Hong et al. 2024, eq. 6.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from alignment.config.optim import OptimConfig, Schedule
from alignment.stages.dpo.config import DpoLoss
from tests.chained import FULL, Chained, config_of
from tests.tiny import tiny_tokenizer
from tests.trl_arguments import QUIET_FLOAT32

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is on trial
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = 8
UNMOVED = 1e-12
"""A rate at which no weight moves, so that the other term has no say, and neither has the order of rows."""
WEIGHTS = (0.1, 0.6)


def our_losses(folder: Path, odds_weight: float) -> tuple[list[float], Path, list[dict[str, Any]]]:
    """The loss of each pair in the order of training, the base model, and the rows in the order of the file."""
    chained = Chained(folder)
    optim = OptimConfig(lr=UNMOVED, batch_size=1, schedule=Schedule.constant, warmup_ratio=0.0)
    config: Any = replace(config_of("dpo", FULL, loss=DpoLoss.orpo, odds_weight=odds_weight), optim=optim)
    lines = chained.run("dpo", FULL, config=config)
    spec = chained.spec("dpo", FULL, config=config)
    rows = [json.loads(line) for line in spec.data_path.read_text().splitlines()][:PAIRS]
    return [line["loss"] for line in lines], chained.base, rows


def their_terms(base: Path, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """log σ(log odds ratio) of each pair in TRL's trainer, as a user would call it."""
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
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_length=4096,
            **QUIET_FLOAT32,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    trainer.train()
    return [line["log_odds_ratio"] for line in trainer.state.log_history if "log_odds_ratio" in line]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_odds_ratio_term_is_that_of_trl_s_own_trainer(tmp_path: Path) -> None:
    (small, base, rows), (large, _, _) = (our_losses(tmp_path / str(weight), weight) for weight in WEIGHTS)
    terms = [(low - high) / (WEIGHTS[1] - WEIGHTS[0]) for low, high in zip(small, large, strict=True)]
    assert len(set(terms)) == PAIRS
    assert sorted(terms) == pytest.approx(sorted(their_terms(base, rows, tmp_path / "trl")), abs=1e-4)
