"""The order in which PyTorch looks for an attention kernel on CUDA, where the flat path cannot serve a model.

Its variable-length kernel is FlashAttention alone. ``scaled_dot_product_attention`` may take cuDNN's kernel, which
plans again for each shape, and batches and caches of text have a new one at every step; and wrong output was reported
for it with grouped queries. So it is left out. FlashAttention takes no mask; the memory-efficient kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention takes the first kernel of ``ORDER`` that can serve a call. Outside CUDA this has no effect."""
    with sdpa_kernel(list(ORDER), set_priority=True):
        yield
