"""PyTorch's ``fully_shard`` for models that share weights, as PPO's roles do (docs/design/0042). ``fully_shard`` makes
a unit of one module or of several: their weights are gathered, and their gradients reduced, in one call. A weight must
belong to one unit. So a layer is a unit with the layers of other models that share its weights, and each process holds
one shard of what they share."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from alignment.core.errors import StageError

_MAGNITUDES = "lora_magnitude_vector"
"""PEFT's name of them."""


class ShardedTrainer(Trainer):
    """A mix-in: on CPUs, accelerate passes over FSDP without a word, and every process would hold everything."""

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator, which must shard if the arguments say so. Raises StageError: it does not."""
        shards = bool(self.args.fsdp)
        processes = PartialState()
        if shards and processes.distributed_type is DistributedType.MULTI_CPU:
            # Any of the kinds for which accelerate asks whether to shard; it replaces it by FSDP then.
            processes.distributed_type = DistributedType.MULTI_XPU
        super().create_accelerator_and_postprocess()
        if shards and not self.is_fsdp_enabled:
            raise StageError(
                f"accelerate does not shard over processes of kind {processes.distributed_type.value}",
                remedy="use launch=zero3, or report this with the versions of torch and accelerate",
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without the magnitudes of DoRA, which begin as the norms of the base's weights: decay would shrink these."""
        return [name for name in super().get_decay_parameter_names(model) if _MAGNITUDES not in name]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """In a checkpoint; DeepSpeed's engine writes the weights itself, sharded. transformers would gather them and
        write them once more, and with a prefix it would wait for ever: PEFT calls a sharded module to save one, on the
        main process alone (https://github.com/huggingface/transformers/pull/29980)."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of a whole model under the names that they have in memory. transformers would write experts under the
        names that they have on a hub. When it resumes, it looks for those in memory, does not find them, and goes on
        with the weights that the stage started from."""
        if state_dict is not None or not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))


def shard_together(root: nn.Module, frozen: Sequence[nn.Module], plugin: FullyShardedDataParallelPlugin) -> None:
    """Shards ``root`` and the models in it, and ``frozen`` models that may share weights with them. The frozen models
    become part of ``root``. They may only be called while ``whole_units`` gathers weights. The state of ``root`` holds
    the trained weights alone."""
    shard = functools.partial(
        fully_shard,
        reshard_after_forward=plugin.reshard_after_forward,
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        offload_policy=plugin.cpu_offload,
    )
    separate = [model for model in frozen if not _ids(model) & _ids(root)]
    root.add_module("frozen_roles", nn.ModuleList(frozen))
    for layers in sharing(_layers(root)):
        _shard_unit(layers, shard)
    for model in separate:
        shard(model)
    shard(root, reshard_after_forward=None)  # by default a root's own weights stay gathered between its passes
    _leave_frozen_out(root)


def _ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters()}


def _layers(root: nn.Module) -> list[nn.Module]:
    models = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    kinds = {name for model in models for name in model._no_split_modules or ()}
    return [module for module in root.modules() if type(module).__name__ in kinds]


def sharing(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """The layers in groups: those that share a weight are in one group. Example: of two models with the same two frozen
    layers, ``[a0, a1, b0, b1]`` gives ``[[a0, b0], [a1, b1]]``."""
    groups: list[list[nn.Module]] = []
    group_of: dict[int, list[nn.Module]] = {}
    for layer in layers:
        weights = _ids(layer)
        group = next((group_of[weight] for weight in weights if weight in group_of), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(layer)
        group_of |= dict.fromkeys(weights, group)
    return groups


def _shard_unit(layers: list[nn.Module], shard: Any) -> None:
    if len(layers) == 1:
        shard(layers[0])
        return
    shard(layers)
    # PyTorch frees a unit's weights when each of its modules was called. Here one model is called after another, and
    # all its layers would stay gathered meanwhile.
    first: Any = layers[0]
    waiting: set[nn.Module] = first._get_fsdp_state()._modules_to_run_forward
    for layer in layers:
        layer.register_forward_pre_hook(functools.partial(_is_whole_call, waiting), prepend=True)


def _is_whole_call(waiting: set[nn.Module], layer: nn.Module, _: Any) -> None:
    """Makes the call of one layer count as a call of its whole unit."""
    waiting.clear()
    waiting.add(layer)


def _leave_frozen_out(root: nn.Module) -> None:
    """Makes the state of ``root`` hold only trained weights; frozen ones are the base's."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        named = module.named_parameters(remove_duplicate=False)
        trained = {f"{prefix}{name}" for name, parameter in named if parameter.requires_grad}
        for name in state.keys() - trained:
            del state[name]

    root.register_state_dict_post_hook(drop)
    root.register_load_state_dict_post_hook(lambda _, differences: differences.missing_keys.clear())


@contextmanager
def whole_units(*models: nn.Module) -> Iterator[None]:
    """Gathers the weights of sharded modules for passes without gradients, in which calls gather and free nothing.
    Every process must enter the block; inside it, each may make as many calls as it likes."""
    units = [module for model in models for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    for unit in units:
        unit.unshard()
        unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, (before, after) in zip(units, hooks, strict=True):
            unit._forward_pre_hooks, unit._forward_hooks = before, after
            unit.reshard()


def put_sharded(optimizer: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Gives an optimiser its weights again after accelerate has prepared it. accelerate finds a sharded weight by the
    address of its shard, and all empty shards have the address 0."""
    for group, named in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = named["params"]
