"""Without a critic, two processes train what one trains, also where ties leave one nothing, or an engine samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.launch import Engine, RolloutSamplingConfig, Sharding
from alignment.config.model import AdapterConfig, Critic
from alignment.config.scoring import ScorerConfig
from alignment.job import StageSpec
from alignment.models.assembly.engine_weights import write_base
from alignment.models.assembly.load import Lineage
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm, PpoConfig, PpoOptimConfig
from tests.chained import FULL, LORA, Chained, config_of
from tests.distributed.test_sharding import alike, lines_of, needs_deepspeed, run_on, shared_out, weights
from tests.engine_server import COMPLETIONS, FakeEngine, engine_server
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE

FIGURES = ("objective/score", "objective/tied_prompts", "loss/policy", "loss/kl", "policy/entropy", "grad_norm")


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


def both(folder: Path, config: PpoConfig, sharding: Sharding) -> list[StageSpec]:
    launches = enumerate((Sharding.none, sharding), 1)
    chains = [(size, shared, Chained(folder / str(size))) for size, shared in launches]
    return [
        run_on(shared_out(chained, "ppo", config.adapter, how, config=config), size) for size, how, chained in chains
    ]


def same(alone: StageSpec, together: StageSpec) -> None:
    figures = [
        torch.tensor([[line[name] for name in FIGURES] for line in lines_of(spec)]) for spec in (alone, together)
    ]
    close(figures[1], figures[0], atol=1e-4, rtol=1e-4)
    actual = weights(together.artifact)
    assert not any("critic" in name for name in actual)
    alike(actual, weights(alone.artifact), atol=1e-5)


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
        norms = [[line["grad_norm"] for line in lines_of(spec)] for spec in (together, alone)]
        close(norms[0], norms[1], atol=1e-4)
    alike(weights(together.artifact), weights(alone.artifact), atol=1e-5)


UNLOAD = "/v1/unload_lora_adapter"


PATIENCE = 5.0
"""Seconds in which two processes make an update here."""


def run(
    folder: Path,
    engine: FakeEngine,
    config: PpoConfig,
    *,
    world_size: int,
    sharding: Sharding = Sharding.none,
    **sampling: Any,
) -> StageSpec:
    own = RolloutSamplingConfig(engine=Engine.vllm, url=engine.url, retries=0, **sampling)
    how = sharding if world_size > 1 else Sharding.none
    spec = shared_out(Chained(folder), "ppo", config.adapter, how, config=replace(config, sampling=own))
    return run_on(spec, world_size)


def served(folder: Path, adapter: AdapterConfig) -> Path:
    base = Chained(folder / "model").base
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    return write_base(start, adapter, torch.float32, folder / "untied")


@needs_deepspeed
@pytest.mark.parametrize(
    ("advantage", "adapter", "sharding"),
    [(Advantage.grpo, LORA, Sharding.zero3), (Advantage.dr_grpo, FULL, Sharding.zero3)],
    ids=lambda value: getattr(getattr(value, "kind", value), "value", value),
)
def test_two_processes_learn_from_an_engine_what_one_learns(
    tmp_path: Path, advantage: Advantage, adapter: AdapterConfig, sharding: Sharding
) -> None:
    config = config_with(adapter, advantage, scorer_in(tmp_path, "len(answer)"))
    specs, asked = [], []
    for world_size in (1, 2):
        with engine_server(served(tmp_path / f"served-{world_size}", adapter)) as engine:
            folder = tmp_path / str(world_size)
            specs.append(run(folder, engine, config, world_size=world_size, sharding=sharding, importance_cap=2.0))
            asked.append(sorted((body["seed"], body["n"], *body["prompt"]) for body in engine.paths(COMPLETIONS)))
            assert engine.names == ["base"]
    assert asked[0] == asked[1], "the same calls"
    assert len(asked[0]) == 2 * PROMPTS
    same(*specs)
    for spec in specs:
        lines = lines_of(spec)
        close([line["engine/importance"] for line in lines], [1.0, 1.0], rtol=1e-4)
        assert max(line["engine/gap"] for line in lines) < 1e-4


def test_weights_stay_until_every_process_has_its_answers(tmp_path: Path) -> None:
    """One update ahead, the second process waits for its answers for longer than the main one learns."""
    config = config_with(LORA, Advantage.rloo, scorer_in(tmp_path, "len(answer)"), updates=3)
    ahead = {"max_staleness": 1, "importance_cap": 2.0}
    base = served(tmp_path, LORA)
    with engine_server(base) as engine:
        alone = run(tmp_path / "1", engine, config, world_size=1, concurrency=1, **ahead)
        in_order = [json.dumps(body["prompt"]) for body in engine.paths(COMPLETIONS)]
    second = set(in_order[PROMPTS : 2 * PROMPTS][1::2]) - set(in_order[PROMPTS : 2 * PROMPTS][::2])
    with engine_server(base) as engine:

        def pausing(body: dict[str, Any]) -> float:
            is_ahead = len(engine.paths(COMPLETIONS)) > PROMPTS and not engine.paths(UNLOAD)
            return PATIENCE if is_ahead and json.dumps(body["prompt"]) in second else 0.0

        engine.pausing = pausing
        together = run(tmp_path / "2", engine, config, world_size=2, **ahead)
    assert [line["engine/staleness"] for line in lines_of(together)] == [0.0, 1.0, 1.0]
    same(alone, together)
