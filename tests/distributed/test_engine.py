"""Two processes ask one engine, and train what one process trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.launch import Engine, RolloutSamplingConfig, Sharding
from alignment.config.model import AdapterConfig
from alignment.job import StageSpec
from alignment.models.assembly.engine_weights import write_base
from alignment.models.assembly.load import Lineage
from alignment.stages.ppo.config import Advantage, PpoConfig
from tests.chained import FULL, LORA, Chained
from tests.distributed.processes import on_processes
from tests.distributed.test_critic_free import PROMPTS, config_with, lines_of, needs_deepspeed, same, scorer_in
from tests.distributed.test_sharding import logs
from tests.engine_server import COMPLETIONS, FakeEngine, engine_server
from tests.oracles.close import close
from tests.tiny import BASE_SOURCE

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
    """The stage in ``folder`` on so many processes."""
    chained = Chained(folder)
    sampling_config = RolloutSamplingConfig(engine=Engine.vllm, url=engine.url, retries=0, **sampling)
    spec = chained.spec("ppo", config.adapter, config=replace(config, sampling=sampling_config))
    spec = replace(spec, sharding=sharding if world_size > 1 else Sharding.none)
    assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
    return spec


def served(folder: Path, adapter: AdapterConfig) -> Path:
    """What the server starts from."""
    base = Chained(folder / "model").base
    start = Lineage(source=BASE_SOURCE, base=base, adapters=())
    return write_base(start, adapter, torch.float32, folder / "untied")


@needs_deepspeed
@pytest.mark.parametrize(
    ("advantage", "adapter", "sharding"),
    [
        (Advantage.grpo, LORA, Sharding.zero3),
        (Advantage.dr_grpo, FULL, Sharding.zero3),
    ],
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
