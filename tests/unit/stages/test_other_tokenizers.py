"""Stages refuse models that were made with another tokenizer or chat template, in every slot that takes one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alignment import worker
from alignment.config.data import DataConfig
from alignment.core.artifacts import MANIFEST
from alignment.core.errors import ModelError
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage, load_policy
from alignment.stages.forgetting.config import ForgettingConfig
from alignment.stages.sft.config import SftConfig
from alignment.training.context import StageContext
from tests.chained import DATA, LORA, config_of
from tests.measuring import GENERAL, Measuring
from tests.tiny import BASE_SOURCE, publish_tiny, tiny_spec

BASE = StageInput(ref="base", path=None)


class OtherTemplate(Measuring):
    """A policy and a reward model whose manifests name another chat template than that of their base."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        start = Lineage(source=BASE_SOURCE, base=self.base, adapters=())
        spec = tiny_spec(folder / "made", SftConfig(), base_path=self.base)
        self.policy = publish_tiny(spec, load_policy(start, torch.float32), start)
        for made in (self.policy, self.reward):
            assert made.path is not None
            file = made.path / MANIFEST
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template_sha256": "0" * 64}))

    def stage_with(self, slot: str) -> StageSpec:
        """A stage that takes one of them in this slot, and the base in all others."""
        arms = {"stage:sft": self.policy}
        match slot:
            case "ppo-reward":
                inputs = {"init": BASE, "reward": self.reward}
                return self.spec(slot, config_of("ppo", LORA), DATA / "preferences.jsonl", inputs=inputs)
            case "evaluate-reference":
                return self._evaluation(slot, {"base": BASE}, reference=self.policy)
            case "evaluate-reward":
                return self._evaluation(slot, {"base": BASE}, reference=BASE, reward=self.reward)
            case "evaluate-arm":
                return self._evaluation(slot, arms, reference=BASE)
            case "forgetting-arm":
                few = DataConfig(source="path:general", limit=4)
                config = ForgettingConfig(arms=list(arms), data=few, questions=few, bootstrap_samples=20)
                questions = {"questions": GENERAL / "questions.jsonl"}
                return self.spec(slot, config, GENERAL / "texts.jsonl", arms=arms, extra_data=questions)
            case "reward_card-reward":
                return self.reward_card(slot, 2)
        raise AssertionError(f"no stage has the slot {slot}")

    def _evaluation(self, slot: str, arms: Mapping[str, StageInput], **inputs: StageInput) -> StageSpec:
        return replace(self.evaluate(slot, 1, arms=list(arms), metrics=[]), arms=dict(arms), inputs=inputs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> OtherTemplate:
    return OtherTemplate(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize(
    "slot",
    [
        "ppo-reward",
        "evaluate-reference",
        "evaluate-reward",
        "evaluate-arm",
        "forgetting-arm",
        "reward_card-reward",
    ],
)
def test_a_model_of_another_chat_template_is_refused_before_anything_is_computed(
    models: OtherTemplate, slot: str
) -> None:
    """Initial policies: test_chains.py; scorers: tests/unit/rewards/test_build.py."""
    spec = models.stage_with(slot)
    with pytest.raises(ModelError, match=f"has a different tokenizer or chat template than {BASE_SOURCE}"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert list((spec.work / "content").iterdir()) == []
