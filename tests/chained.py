"""Stages run one after another in a folder, as the worker runs them, on a tiny model and a few of the shipped rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.model import CONTINUE, AdapterConfig, AdapterKind, Chain, Dtype, ModelConfig
from alignment.config.optim import OptimConfig
from alignment.config.stage import StageConfig
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage, lineage, load_policy
from alignment.models.assembly.roles import load_start
from alignment.stages.cpt.kind import CptConfig
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.ppo.config import PpoConfig, PpoOptimConfig
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from tests.device import need_bitsandbytes
from tests.tiny import BASE_SOURCE, liven, publish_tiny, save_tiny_model, tiny_spec

DATA = Path(__file__).parents[1] / "data" / "quickstart"
FILES = {
    "cpt": "conversations",
    "sft": "conversations",
    "reward": "preferences",
    "dpo": "preferences",
    "kto": "preferences",
}
_CONFIGS: dict[str, tuple[type[StageConfig], dict[str, Any]]] = {
    "cpt": (CptConfig, {"max_length": 64}),
    "sft": (SftConfig, {}),
    "reward": (RewardConfig, {"eval_fraction": 0.0}),
    "dpo": (DpoConfig, {"save_every": 1}),
    "kto": (KtoConfig, {"save_every": 1}),
}
LORA, FULL = AdapterConfig(rank=4), AdapterConfig(kind=AdapterKind.full)
QLORA = AdapterConfig(kind=AdapterKind.qlora, rank=4, chain=Chain.stack)
DORA = AdapterConfig(kind=AdapterKind.dora, rank=4)
PREFIX = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=4)
SAME_PREFIX = AdapterConfig(kind=AdapterKind.prefix, virtual_tokens=4, chain=CONTINUE)


def config_of(kind: str, adapter: AdapterConfig, **changes: Any) -> StageConfig:
    """Two optimiser steps on eight rows."""
    data = DataConfig(source=str(DATA), limit=8)
    of_all: dict[str, Any] = {"adapter": adapter, "data": data, "max_length": 4096}
    if kind == "ppo":
        sizes = {"updates": 2, "ppo_epochs": 2, "max_prompt_length": 4096, "max_new_tokens": 6}
        del of_all["max_length"]
        return PpoConfig(**{**of_all, "optim": PpoOptimConfig(lr=1e-2, batch_size=4), **sizes, **changes})
    config, own = _CONFIGS[kind]
    optim = OptimConfig(lr=1e-2, batch_size=4, warmup_ratio=0.0)
    return config(**{**of_all, "optim": optim, **own, **changes})


class Chained:
    """Runs stages in one folder as the worker does, one after another; ``base`` as for ``save_tiny_model``."""

    def __init__(self, folder: Path, *, dtype: Dtype = Dtype.float32, **model: Any) -> None:
        self.folder = folder
        self.base = save_tiny_model(folder / "base", **model)
        self.model = ModelConfig(source=BASE_SOURCE, dtype=dtype)
        self.inputs: dict[str, StageInput] = {}

    def spec(
        self,
        kind: str,
        adapter: AdapterConfig,
        *,
        init: str = "base",
        config: StageConfig | None = None,
        **changes: Any,
    ) -> StageSpec:
        """What the stage is told; ``init`` names the stage that it starts from."""
        inputs = {"init": self.inputs.get(init, StageInput(ref="base", path=None))}
        config = config or config_of(kind, adapter)
        if isinstance(config, PpoConfig) and config.reward is not None:
            inputs["reward"] = self.inputs["reward"]
        return tiny_spec(
            self.folder,
            config,
            inputs=inputs,
            **{"data_path": DATA / f"{FILES.get(kind, 'preferences')}.jsonl", "model": self.model, **changes},
        )

    def run(self, kind: str, adapter: AdapterConfig, *, init: str = "base", **changes: Any) -> list[dict[str, float]]:
        if adapter.kind is AdapterKind.qlora:
            need_bitsandbytes()
        spec = self.spec(kind, adapter, init=init, **changes)
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
        self.inputs[kind] = StageInput(ref=f"stage:{kind}", path=spec.artifact)
        return [json.loads(line) for line in (spec.artifact / "metrics.jsonl").read_text().splitlines()]

    def adapter_from_outside(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        """An adapter on the base as another program saves it, beside files of its training; ``init="outside"`` has a
        stage start from it."""
        model = AutoModelForCausalLM.from_pretrained(str(self.base), dtype=dtype)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
        policy = get_peft_model(model, config)
        liven(policy)
        folder = self.folder / "outside"
        policy.save_pretrained(str(folder))
        (folder / "optimizer.pt").write_bytes(b"moments")
        self.inputs["outside"] = StageInput(ref=f"path:{folder}", path=folder)
        return folder

    def policy(self, kind: str) -> Any:
        return load_policy(lineage(self.spec("sft", LORA), self.inputs[kind]), torch.float32)


IDENTITY = {"kind": "sft", "base": {"content": None, "dtype": "float32"}}


def tiny_base(folder: Path, **changes: Any) -> Lineage:
    return Lineage(source=BASE_SOURCE, base=save_tiny_model(folder / "base", **changes), adapters=())


def trained_policy(
    folder: Path, base: Lineage, adapter: AdapterConfig = LORA, identity: Mapping[str, Any] = IDENTITY
) -> tuple[Any, StageInput]:
    """A policy on ``base`` that says something else than the base, and its artifact; the second stage is DPO."""
    model = load_start(base, adapter, Dtype.float32, task=TaskType.CAUSAL_LM, device=torch.device("cpu"))
    liven(model)
    if adapter.kind is AdapterKind.full:
        model.model.norm.weight.data.mul_(1.5)
    config = DpoConfig(adapter=adapter) if base.adapters else SftConfig(adapter=adapter)
    spec = tiny_spec(folder, config, base_path=base.base, identity=dict(identity))
    return model, publish_tiny(spec, model, base)
