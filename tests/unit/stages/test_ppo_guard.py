"""The guard of a PPO stage as the worker runs it: whom it asks, and what its choice means for the critic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment import worker
from alignment.config.overoptimisation import GuardConfig
from alignment.config.scoring import ScorerConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.training.context import StageContext
from alignment.training.rl.guard import Guard
from tests.chained import LORA, Chained, config_of


def _run(folder: Path) -> Path:
    """The artifact of a stage that wants few words and whose guard wants many; both are rules."""
    chained = Chained(folder)
    config = config_of(
        "ppo",
        LORA,
        reward=None,
        scorers=[ScorerConfig(source="length", target=3, weight=-2.0)],
        missing_eos_penalty=0.0,
        guard=GuardConfig(every=1, prompts=2, scorer=ScorerConfig(source="length", target=3)),
    )
    assert isinstance(config, PpoConfig)
    spec = chained.spec("ppo", LORA, config=config)
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return spec.artifact


def test_the_guard_asks_its_own_scorer_and_the_stage_its_own(tmp_path: Path) -> None:
    lines = (_run(tmp_path) / "guard.jsonl").read_text().splitlines()
    looks = [json.loads(line) for line in lines]
    assert [look["step"] for look in looks] == [0, 1, 2]
    means = [look["guard/scorer"] for look in looks]
    assert max(means) > 0.0
    assert [look["guard/proxy"] for look in looks] == pytest.approx([-2.0 * mean for mean in means], abs=1e-5)


@pytest.mark.parametrize("best_update", [0.0, 2.0])
def test_a_critic_is_kept_beside_the_policy_that_it_learned_with_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_update: float
) -> None:
    def finish(*_: Any) -> dict[str, float]:
        return {"guard/kept_update": best_update}

    monkeypatch.setattr(Guard, "finish", finish)
    assert (_run(tmp_path) / "critic.safetensors").is_file() is (best_update == 2.0)
