"""Without a critic, two processes train what one process trains, also where ties leave one of them without answers."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.launch import Sharding
from alignment.config.model import AdapterConfig, Critic
from alignment.config.scoring import ScorerConfig
from alignment.job import StageSpec
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm, PpoConfig, PpoOptimConfig
from tests.chained import FULL, LORA, Chained, config_of
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs, weights
from tests.oracles.close import close

FIGURES = ("objective/score", "objective/tied_prompts", "loss/policy", "loss/kl", "policy/entropy", "grad_norm")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
PROMPTS = 4


def config_with(adapter: AdapterConfig, advantage: Advantage, scorer: Path, **changes: Any) -> PpoConfig:
    """Four prompts an update, two answers each, and micro-batches of about one answer."""
    settings = {
        "advantage": advantage,
        "critic": Critic.none,
        "reward": None,
        "scorers": [ScorerConfig(source=f"{scorer}:score")],
        "completions_per_prompt": 2,
        "kl": KlConfig(coefficient=0.3, apply_to=KlTerm.loss),
        "clip_high": 0.3,
        "entropy_coefficient": 0.05,
        "drop_ties": True,
        "missing_eos_penalty": 0.0,
        "optim": PpoOptimConfig(lr=1e-2, batch_size=2 * PROMPTS, adam_eps=1e-2, micro_batch_tokens=400),
    }
    config: Any = config_of("ppo", adapter, **(settings | changes))
    return config


def scorer_in(folder: Path, body: str) -> Path:
    file = folder / "scorer.py"
    lines = ("def score(prompts, completions, rows):", f"    return [{body} for answer, row in zip(completions, rows)]")
    file.write_text("\n".join(lines) + "\n")
    return file


def lines_of(spec: StageSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.artifact / "metrics.jsonl").read_text().splitlines()]


def both(folder: Path, config: PpoConfig, sharding: Sharding) -> list[StageSpec]:
    """The stage on one process and on two."""
    specs = []
    for world_size, shared in ((1, Sharding.none), (2, sharding)):
        chained = Chained(folder / str(world_size))
        spec = replace(chained.spec("ppo", config.adapter, config=config), sharding=shared)
        assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
        specs.append(spec)
    return specs


def same(alone: StageSpec, together: StageSpec) -> None:
    figures = [
        torch.tensor([[line[name] for name in FIGURES] for line in lines_of(spec)]) for spec in (alone, together)
    ]
    close(figures[1], figures[0], atol=1e-4, rtol=1e-4)
    expected = weights(alone.artifact)
    actual = weights(together.artifact)
    assert actual.keys() == expected.keys()
    assert not any("critic" in name for name in actual)
    for name, held in actual.items():
        close(held, expected[name], atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize(
    ("advantage", "adapter", "sharding"),
    [
        (Advantage.rloo, LORA, Sharding.none),
        (Advantage.dr_grpo, LORA, Sharding.zero2),
        (Advantage.grpo, FULL, Sharding.zero3),
    ],
    ids=lambda value: getattr(getattr(value, "kind", value), "value", value),
)
def test_two_processes_train_what_one_trains(
    tmp_path: Path, advantage: Advantage, adapter: AdapterConfig, sharding: Sharding
) -> None:
    """The characters of an answer count, but not those of answers to every other prompt."""
    scorer = scorer_in(tmp_path, 'len(answer) if int(row["id"][-1]) % 2 else 0.5')
    alone, together = both(tmp_path, config_with(adapter, advantage, scorer), sharding)
    assert {line["objective/tied_prompts"] for line in lines_of(alone)} - {0.0, float(PROMPTS)}, "some should tie"
    same(alone, together)


@needs_deepspeed
@pytest.mark.parametrize("sharding", [Sharding.none, Sharding.zero3], ids=lambda sharding: sharding.value)
@pytest.mark.parametrize("learned", [0, 1])
def test_a_process_without_answers_to_learn_from_waits_for_nobody(
    tmp_path: Path, learned: int, sharding: Sharding
) -> None:
    """Of eight prompts in two updates all tie but one, or all do."""
    scorer = scorer_in(tmp_path, f'len(answer) if {learned} and row["id"].endswith("1") else 0.5')
    config = config_with(LORA, Advantage.grpo, scorer, updates=2, ppo_epochs=1)
    alone, together = both(tmp_path, config, sharding)
    tied = [line["objective/tied_prompts"] for line in lines_of(alone)]
    assert sorted(tied) == [PROMPTS - learned, PROMPTS], "one update should have the one prompt"
    if learned:
        close(
            torch.tensor([line["grad_norm"] for line in lines_of(together)]),
            [line["grad_norm"] for line in lines_of(alone)],
            atol=1e-4,
        )
    for name, held in weights(together.artifact).items():
        close(held, weights(alone.artifact)[name], atol=1e-5)
