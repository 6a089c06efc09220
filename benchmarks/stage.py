"""The stage file that our own contestant's worker reads: the same settings as everyone's, in our words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind, Critic, Dtype, ModelConfig
from alignment.config.optim import OptimConfig, Schedule
from alignment.config.run import TrackingConfig
from alignment.config.scoring import ScorerConfig
from alignment.config.stage import StageConfig
from alignment.config.typed import to_plain
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.ppo.config import Advantage, KlConfig, KlTerm, PpoConfig, PpoOptimConfig
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.sft.kind import SftConfig
from benchmarks.figures import Sharing
from benchmarks.setting import (
    BETA,
    GRPO_BETA,
    GRPO_GROUP,
    GRPO_LENGTH,
    LEARNING_RATE,
    LORA,
    MAX_GRAD_NORM,
    MAX_LENGTH,
    MAX_PROMPT_LENGTH,
    MICRO_BATCH_TOKENS,
    PPO_EPOCHS,
    PPO_MICRO_BATCH_TOKENS,
    PPO_NEW_TOKENS,
    PROMPTS,
    SEED,
)

_NEVER = 10**6
MODEL = ModelConfig(source="bundled:smollm2-135m", dtype=Dtype.bfloat16)


def stage_config(
    kind: str,
    adapter: str,
    data: Path,
    *,
    steps: int,
    rows: int,
    max_length: int = MAX_LENGTH,
    sharing: Sharing | None = None,
    master_weights: bool = True,
    optim_changes: Mapping[str, Any] = MappingProxyType({}),
) -> StageConfig:
    """A stage of ``kind`` that takes ``steps`` steps (PPO: updates), all of them on the ``rows`` rows of ``data``.

    ``optim_changes`` are laid over the settings of its optimiser.
    """
    source = DataConfig(source=f"path:{data}")
    how = AdapterConfig(
        kind=AdapterKind(adapter),
        rank=int(str(LORA["r"])),
        alpha=float(str(LORA["lora_alpha"])),
        dropout=float(str(LORA["lora_dropout"])),
        target_modules=[str(LORA["target_modules"])],
        master_weights=master_weights,
    )
    if kind == "ppo":
        return _ppo(source, how, updates=steps, sharing=sharing or Sharing())
    if kind == "grpo":
        return _grpo(_ppo(source, how, updates=steps, sharing=Sharing(completions=GRPO_GROUP)))
    optim = OptimConfig(
        lr=LEARNING_RATE[adapter],
        batch_size=rows,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        epochs=steps,
        max_steps=steps,
        schedule=Schedule.constant,
        warmup_ratio=0.0,
        max_grad_norm=MAX_GRAD_NORM,
    )
    optim = replace(optim, **optim_changes)
    if kind == "reward":
        return RewardConfig(
            adapter=how, data=source, optim=optim, max_length=max_length, eval_fraction=0.0, save_every=_NEVER
        )
    if kind == "dpo":
        return DpoConfig(
            adapter=how,
            data=source,
            optim=optim,
            max_length=max_length,
            beta=BETA,
            precompute_reference=False,
            save_every=_NEVER,
        )
    if kind == "kto":
        return KtoConfig(adapter=how, data=source, optim=optim, max_length=max_length, beta=BETA, save_every=_NEVER)
    return SftConfig(adapter=how, data=source, optim=optim, max_length=max_length, save_every=_NEVER)


def _ppo(source: DataConfig, adapter: AdapterConfig, *, updates: int, sharing: Sharing) -> PpoConfig:
    return PpoConfig(
        adapter=adapter,
        critic=Critic.shared if sharing.one_pass else Critic.separate,
        data=source,
        optim=PpoOptimConfig(
            lr=LEARNING_RATE[adapter.kind.value],
            batch_size=PROMPTS,
            micro_batch_tokens=PPO_MICRO_BATCH_TOKENS[adapter.kind.value],
            schedule=Schedule.constant,
            max_grad_norm=MAX_GRAD_NORM,
        ),
        updates=updates,
        completions_per_prompt=sharing.completions,
        ppo_epochs=PPO_EPOCHS,
        num_minibatches=1,
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_new_tokens=PPO_NEW_TOKENS,
        save_every=_NEVER,
    )


def _grpo(config: PpoConfig) -> PpoConfig:
    """The same without a critic and without a reward model: one epoch, and the KL in the loss."""
    return replace(
        config,
        reward=None,
        scorers=[ScorerConfig(source="length", target=GRPO_LENGTH)],
        advantage=Advantage.grpo,
        critic=Critic.none,
        kl=KlConfig(coefficient=GRPO_BETA, apply_to=KlTerm.loss),
        ppo_epochs=1,
    )


def artifact_of(folder: Path) -> Path:
    """Where a stage whose file lies in ``folder`` leaves its result."""
    return folder / "artifact"


def write_stage(folder: Path, config: StageConfig, *, base: Path, data: Path, reward: Path | None = None) -> Path:
    """Writes ``folder/stage.yaml`` with every folder inside ``folder``, as the driver would; returns its path."""
    work, run = folder / "artifact.work", folder / "run"
    for path in (work, run):
        path.mkdir(parents=True, exist_ok=True)
    inputs: dict[str, dict[str, str | None]] = {"init": {"ref": "base", "path": None}}
    if reward is not None:
        inputs["reward"] = {"ref": "stage:reward", "path": str(reward)}
    fields = {
        "run": "benchmark",
        "recipe": "benchmark",
        "stage": config.kind,
        "config": to_plain(config),
        "model": to_plain(MODEL),
        "base_path": str(base),
        "inputs": inputs,
        "arms": {},
        "data_path": str(data),
        "fingerprint": "0" * 64,
        "identity": {},
        "input_fingerprints": {},
        "artifact": str(artifact_of(folder)),
        "work": str(work),
        "run_folder": str(run),
        "seed": SEED,
        "launch": {"sharding": "none", "offload": "none"},
        "tracking": to_plain(TrackingConfig()),
        "git_commit": "",
    }
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
