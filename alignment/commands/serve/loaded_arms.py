"""Policies as plain models of transformers that end answers where they learned to, and as files for a vLLM server."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from alignment.commands.serve.vllm_layout import VllmFiles, vllm_layout
from alignment.commands.shared.loaded_policies import generation_settings, parts_of
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.config.model import Dtype
from alignment.core.errors import DataError, ModelError
from alignment.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from alignment.data.templates import reads_tools
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.tokens.tokenizer import tokenizer_hashes
from alignment.data.turns import Message
from alignment.models.assembly.adapters import saved_config
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.training.context import own_device


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedArm:
    """A model with all adapters merged, and the tokenizer that it was trained with."""

    name: str
    model: PreTrainedModel
    tokenizer: Any


def load_arms(policies: Sequence[StoredPolicy]) -> list[LoadedArm]:
    """Loads the policies on this process's device. Raises ArtifactError, ModelError, DataError."""
    arms = []
    for policy in policies:
        lineage, tokenizer = lineage_and_tokenizer(policy)
        model = merged(lineage, tokenizer, policy.dtype).to(own_device())
        arms.append(LoadedArm(name=policy.name, model=model.requires_grad_(False), tokenizer=tokenizer))
    return arms


def lineage_and_tokenizer(policy: StoredPolicy) -> tuple[Lineage, Any]:
    """What the policy consists of; a first prompt is rendered, so that an unusable template is refused at once. It
    raises as ``load_arms`` does."""
    lineage, tokenizer = parts_of(*policy.sources)
    try:
        prompt_ids(tokenizer, [Message(role="user", content="Hi.")])
    except DataError as error:
        raise DataError(error.message, where=policy.name, remedy=error.remedy) from error
    return lineage, tokenizer


def merged(lineage: Lineage, tokenizer: Any, dtype: str) -> PreTrainedModel:
    """The policy's model with all adapters merged, which ends answers at every token that ends one in training."""
    model = load_policy(lineage, DTYPES[Dtype(dtype)])
    model.config.use_cache = True
    model.generation_config = generation_settings(end_ids(tokenizer), tokenizer.pad_token_id)
    return model


_A, _B = "lora_A.weight", "lora_B.weight"
_FACTOR = re.compile(r"(.*)\.(lora_[AB]\.weight)")


def write_sum(folders: Sequence[Path], to: Path) -> None:
    """Writes the sum of saved LoRA adapters in PEFT's form. Raises ModelError."""
    configs = [saved_config(folder) for folder in folders]
    ranks = [config.r for config in configs]
    scales = [config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r) for config in configs]
    adapters = [_factors(folder) for folder in folders]
    modules = sorted({module for adapter in adapters for module in adapter})
    joined: dict[str, Tensor] = {}
    for module in modules:
        ours = [adapter.get(module) for adapter in adapters]
        shape = next(factors for factors in ours if factors is not None)
        inputs, outputs = shape[_A].shape[1], shape[_B].shape[0]
        filled = [
            factors or {_A: torch.zeros(rank, inputs), _B: torch.zeros(outputs, rank)}
            for factors, rank in zip(ours, ranks, strict=True)
        ]
        joined[f"{module}.{_A}"] = torch.cat([factors[_A] for factors in filled])
        joined[f"{module}.{_B}"] = torch.cat(
            [scale * factors[_B] for scale, factors in zip(scales, filled, strict=True)], dim=1
        )
    to.mkdir(parents=True)
    save_file(joined, to / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folders[0] / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    names = sorted({module.rpartition(".")[2] for module in modules})
    config |= {"r": sum(ranks), "lora_alpha": sum(ranks), "use_rslora": False, "target_modules": names}
    (to / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """By module, ``lora_A.weight [rank, inputs]`` and ``lora_B.weight [outputs, rank]``, in float32."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            raise ModelError(f"holds {name}, which is not a factor", where=str(folder))
        factors.setdefault(match[1], {})[match[2]] = tensor.float()
    return factors


_REFUSE_TOOLS = (
    "{%- if tools %}{{- raise_exception('tools: the chat template of this policy has no place for them') }}"
    "{%- endif %}\n"
)


def write_files(policies: Sequence[StoredPolicy], files: VllmFiles) -> None:
    """Writes the tokenizer, the generation config, merged weights of a single policy, and sums of adapters. Raises
    ConfigError, ModelError, ArtifactError, DataError."""
    layout = vllm_layout(policies)
    loaded = [lineage_and_tokenizer(policy) for policy in policies]
    lineage, tokenizer = loaded[0]
    for policy, (_, other) in zip(policies[1:], loaded[1:], strict=True):
        _refuse_other_tokenizer(policies[0], tokenizer, policy, other)
    if layout.weights is None:
        merged(lineage, tokenizer, policies[0].dtype).save_pretrained(str(files.merged))
    for arm in layout.arms:
        if len(arm.folders) > 1:
            write_sum(arm.folders, files.adapter(arm))
    if not reads_tools(tokenizer.chat_template):
        own = tokenizer.chat_template  # refuses the tools that it would leave out; vLLM passes the reason on
        tokenizer.chat_template = (
            _REFUSE_TOOLS + own if isinstance(own, str) else {name: _REFUSE_TOOLS + text for name, text in own.items()}
        )
    tokenizer.save_pretrained(str(files.tokenizer))
    generation_settings(end_ids(tokenizer), tokenizer.pad_token_id).save_pretrained(str(files.generation))


def _refuse_other_tokenizer(first: StoredPolicy, tokenizer: Any, policy: StoredPolicy, other: Any) -> None:
    hashes, others = tokenizer_hashes(tokenizer), tokenizer_hashes(other)
    for name, differs in (
        ("vocabulary", hashes["tokenizer_sha256"] != others["tokenizer_sha256"]),
        ("chat template", hashes["chat_template_sha256"] != others["chat_template_sha256"]),
        ("set of tokens that end an answer", end_ids(tokenizer) != end_ids(other)),
    ):
        if differs:
            message = f"{policy.name} has a different {name} than {first.name}, and one vLLM server can have only one"
            remedy = "use --engine transformers, or serve one arm at a time"
            raise ModelError(message, where="--arm", remedy=remedy)
