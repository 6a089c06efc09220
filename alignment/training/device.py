"""The device of a worker process: the launcher chooses it, and PyTorch has to agree.

The launcher detects GPUs without PyTorch, so the two may differ. A stage that was meant for a GPU would then train on
the CPU, or several processes would share a GPU by mistake.
"""

from __future__ import annotations

import os

import torch

from alignment.config.launch import DEVICE
from alignment.core.errors import ConfigError


def own_device() -> torch.device:
    """This process's own GPU, or the CPU.

    Raises:
        ConfigError: the launcher and PyTorch disagree about the device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = os.environ.get(DEVICE, "cuda" if count else "cpu")
    if kind == "cpu" and count:
        raise ConfigError(
            f"PyTorch finds {_gpus(count)}, but the launcher found none",
            where="device",
            remedy="set CUDA_VISIBLE_DEVICES=0 to use a GPU, or CUDA_VISIBLE_DEVICES= (empty) to use the CPU",
        )
    if kind == "cuda" and count <= rank:
        raise ConfigError(
            f"the launcher found a GPU for process {rank} of this machine, but PyTorch {torch.__version__} finds "
            + (_gpus(count) if count else "none that it can use"),
            where="device",
            remedy="install the PyTorch build that fits the GPU's driver; set CUDA_VISIBLE_DEVICES= (empty) to use "
            "the CPU",
        )
    return torch.device("cuda", rank) if count else torch.device("cpu")


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
