"""Attention of padded batches takes a kernel in our order, and leaves the caller's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from alignment.models.kernels.sdpa_order import without_cudnn


def _choice() -> list[SDPBackend]:
    """The kernels that may be taken, in their order."""
    enabled = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    order = list(torch._C._get_sdp_priority_order())
    return sorted(
        (backend for backend, taken in enabled.items() if taken), key=lambda backend: order.index(int(backend))
    )


@pytest.mark.parametrize("cudnn", [True, False])
def test_flash_attention_comes_first_and_cudnn_is_left_out(cudnn: bool) -> None:
    original = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    try:
        before = _choice()
        with without_cudnn(), without_cudnn():
            during = _choice()
        assert _choice() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(original)
    assert during == [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
