"""Published results of tiny models, to be exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import TaskType

from alignment.config.model import AdapterConfig, AdapterKind, Dtype
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage
from alignment.models.assembly.start import load_start
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.tiny import BASE_SOURCE, liven, publish_tiny, save_tiny_model, tiny_spec

IDENTITY = {"kind": "sft", "base": {"content": None, "dtype": "float32"}}
LORA, FULL = AdapterConfig(rank=4), AdapterConfig(kind=AdapterKind.full)


def tiny_base(folder: Path, **changes: Any) -> Lineage:
    """A model folder in ``folder/base``; see ``save_tiny_model`` for ``changes``."""
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
