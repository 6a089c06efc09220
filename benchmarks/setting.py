"""What is the same for everyone. Standard library only: every environment imports it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 8
"""Rows, or pairs, of a training step."""
STEPS = 3
"""Steps of a training contestant: the first is the warm-up, the second and third are measured."""
MICRO_BATCH_TOKENS = 2048
"""The default of our stages, which count micro-batches in tokens; rivals count them in rows."""
LARGER_MICRO_BATCH_TOKENS = 4096
"""For pairs, of which a step has more tokens, where memory is plentiful, and with activation checkpointing."""
MAX_LENGTH = 512
"""Tokens of the longest row, or of the longer sequence of a pair."""
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEARNING_RATE = {"lora": 2e-4, "full": 2e-5}
"""Constant, without warm-up, so that every step of every contestant takes the same."""
MAX_GRAD_NORM = 1.0
SAME_LOSS = 0.01
"""Largest relative difference of losses between contestants that are said to learn the same."""
BETA = 0.1
SEED = 42
REPETITIONS = 5

AUTOCAST, WITHOUT_INPUT_CASTS, WITHOUT_AUTOCAST = "autocast", "autocast without input casts", "no autocast"
"""Ways to train in bfloat16: autocast with PEFT's casts of an adapter's inputs to float32, autocast without them, and
the base in bfloat16 with those casts, which an adapter in float32 then needs."""
STATIC_COMPILED = "static, compiled"
"""A cache of `generate`."""

PROMPTS = 32
"""Prompts of a rollout or of a batch of answers."""
MAX_PROMPT_LENGTH = 96
PPO_NEW_TOKENS = 48
PPO_EPOCHS = 4
PPO_MEASURED = 1
"""Updates after the warm-up: one of TRL's takes minutes on two cores. Each repetition has other rows."""
PPO_REPETITIONS = 3
"""Fewer than others have: a repetition takes half an hour or more on two cores."""
PPO_MICRO_BATCH = 8
"""Rows, by TRL's default."""
PPO_MICRO_BATCH_TOKENS = {"lora": 2048, "full": 1024}
"""The default of our PPO stage; full training takes half of it, to hold fewer activations."""

GRPO_GROUP = 8
"""Answers to a prompt; an update has as many answers as one of PPO, so the prompts are fewer."""
GRPO_BETA = 0.04
"""Shao et al. 2024, section 4.2."""
GRPO_LENGTH = 20
"""Tokens of the answer that scores highest: a rule, so that no reward model is measured."""


def read_json(path: Path) -> Any:
    """The file's content."""
    return json.loads(path.read_text(encoding="utf-8"))
