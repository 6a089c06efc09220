"""Several simulated devices: NCCL's name stands for gloo, which works on the same memory.

The host waits for gloo only where it would wait for NCCL; objects travel through memory of the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.simulated_device.library import Library


def use_gloo(library: Library) -> None:
    """``init_process_group("nccl")`` makes a group of gloo."""
    library.replace_collectives()
    distributed: Any = torch.distributed
    otherwise = distributed.init_process_group

    def init_process_group(backend: str | None = None, *arguments: Any, **options: Any) -> None:
        otherwise("gloo" if backend == "nccl" else backend, *arguments, **options)

    def all_gather_into_tensor(output: Tensor, own: Tensor, group: Any = None, async_op: bool = False) -> Any:
        """NCCL takes an output of any shape with as many numbers; gloo wants a part for each process."""
        parts = output.view(-1, *own.shape).unbind(0)
        return distributed.all_gather(list(parts), own, group=group, async_op=async_op)

    distributed.is_nccl_available = lambda: True
    distributed.all_gather_into_tensor = all_gather_into_tensor
    distributed.init_process_group = init_process_group
