"""How one vLLM server holds several policies: one set of weights, and an adapter for each policy on it.

The sum of LoRA adapters is a LoRA adapter whose rank is the sum of theirs. So a policy that was trained on merged or
stacked adapters still stands on its bare base (loaded_arms.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.core.artifacts import Manifest, inside, read_manifest
from alignment.core.errors import ArtifactError, ConfigError, ModelError
from alignment.core.files import parse_json
from alignment.engines.server_process import BASE, RANKS


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmArm:
    """A policy that is an adapter: the sum of those in ``folders``; ``rank`` is the sum of their ranks."""

    name: str
    folders: tuple[Path, ...]
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VllmLayout:
    """What the server loads. ``weights`` is the folder of the weights that it calls ``weights_name``. It is None if
    there is a single policy whose adapters have to be merged first. ``arms`` are the other policies."""

    weights: Path | None
    weights_name: str
    arms: tuple[VllmArm, ...] = ()


class VllmFiles:
    """What is written for the server, below ``folder``: the tokenizer with the chat template, the folder of the
    generation config, which has the tokens that end an answer, and the merged weights of a single policy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer, self.generation, self.merged = folder / "tokenizer", folder / "generation", folder / "weights"

    def adapter(self, arm: VllmArm) -> Path:
        """The adapter of a policy: as training wrote it, or a sum of several, written here."""
        return arm.folders[0] if len(arm.folders) == 1 else self.folder / "adapters" / quote(arm.name, safe="")


def vllm_layout(policies: Sequence[StoredPolicy]) -> VllmLayout:
    """How these policies are served. Raises ConfigError."""
    if len(policies) == 1:
        (policy,) = policies
        is_merged = policy.artifact is not None and bool(_manifest_of(policy).adapters)
        return VllmLayout(weights=None if is_merged else _weights(policy), weights_name=policy.name)
    for policy in policies:
        _refuse_other_weights(policy, policies[0])
    arms = tuple(_arm(policy) for policy in policies if policy.artifact is not None)
    return VllmLayout(weights=_weights(policies[0]), weights_name=BASE, arms=arms)


def refuse_prefix(policy: StoredPolicy) -> None:
    """Raises ModelError if the policy is not plain weights once its adapters are merged: if it has a prefix."""
    if policy.artifact is not None and any("num_virtual_tokens" in config for config in _configs(policy)):
        message = f"{policy.name} has a prefix, which cannot be merged into weights and which no engine here can serve"
        raise ModelError(message, where="--arm", remedy="use `align chat` instead")


def _manifest_of(policy: StoredPolicy) -> Manifest:
    manifest = read_manifest(Path(policy.artifact or ""))
    if manifest is None:
        raise ArtifactError("no complete artifact here", where=str(policy.artifact))
    return manifest


def _weights(policy: StoredPolicy) -> Path:
    return Path(policy.base) if policy.base is not None else Path(policy.artifact or "") / "model"


def _arm(policy: StoredPolicy) -> VllmArm:
    ranks = [int(config["r"]) for config in _configs(policy)]
    if not ranks:
        _refuse(policy, "it has weights of its own")
    if sum(ranks) > RANKS[-1]:
        _refuse(policy, f"its adapters have rank {sum(ranks)} in total, and vLLM takes at most {RANKS[-1]}")
    return VllmArm(name=policy.name, folders=_folders(policy), rank=sum(ranks))


def _refuse_other_weights(policy: StoredPolicy, first: StoredPolicy) -> None:
    if _weights(policy).resolve() != _weights(first).resolve():
        _refuse(policy, f"it is not based on the same weights as {first.name}")
    if policy.dtype != first.dtype:
        _refuse(policy, f"its weights are {policy.dtype}, but {first.name} has {first.dtype}")
    if policy.artifact is None:
        return
    if policy.name == BASE:
        raise ConfigError(f"{BASE!r} is the name of the base model", where="--arm", remedy="rename its folder")
    if any(applied.get("nf4") for applied in _manifest_of(policy).adapters_stood.values()):
        _refuse(policy, "its adapters were trained on weights in four bits")
    for config in _configs(policy):
        if config.get("use_dora"):
            _refuse(policy, "it has a DoRA adapter, which vLLM cannot serve as an adapter")
        if config.get("modules_to_save"):
            _refuse(policy, f"it contains whole modules: {', '.join(config['modules_to_save'])}")


def _refuse(policy: StoredPolicy, reason: str) -> None:
    raise ConfigError(
        f"vLLM serves several arms as LoRA adapters on one set of weights, and {policy.name} cannot be one of them: "
        f"{reason}",
        where="--arm",
        remedy="use --engine transformers, or serve one arm at a time",
    )


def _folders(policy: StoredPolicy) -> tuple[Path, ...]:
    artifact = Path(policy.artifact or "")
    return tuple(inside(artifact, name) for name in _manifest_of(policy).adapters)


def _configs(policy: StoredPolicy) -> list[dict[str, Any]]:
    configs = []
    for file in (folder / "adapter_config.json" for folder in _folders(policy)):
        try:
            configs.append(dict(parse_json(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"cannot be read: {error}", where=str(file)) from error
    return configs
