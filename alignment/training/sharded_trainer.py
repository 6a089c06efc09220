"""A trainer whose weights PyTorch shards wherever it runs, and whose weight decay leaves out DoRA's magnitudes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_model
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from alignment.core.errors import StageError

_MAGNITUDES = "lora_magnitude_vector"
"""PEFT's name of them."""


class ShardedTrainer(Trainer):
    """A mix-in: on CPUs, accelerate passes over FSDP without a word, and every process would hold everything."""

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the accelerator, which must shard if the arguments say so.

        Raises:
            StageError: it does not.
        """
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
        """In a checkpoint; DeepSpeed's engine writes the weights itself, sharded.

        transformers would gather them and write them once more, and with a prefix it would wait for ever: PEFT calls a
        sharded module to save one, on the main process alone (https://github.com/huggingface/transformers/pull/29980).
        """
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of a whole model under the names that they have in memory.

        transformers would write experts under the names that they have on a hub. When it resumes, it looks for those in
        memory, does not find them, and goes on with the weights that the stage started from.
        """
        if state_dict is not None or not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / SAFE_WEIGHTS_NAME))
