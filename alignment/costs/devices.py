"""Devices by name, with the figures that their makers publish."""

from __future__ import annotations

from dataclasses import dataclass

THIS = "this"
"""The name of the machine that plans."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU: its memory in bytes, dense bfloat16 products with float32 sums in FLOP/s, and memory's bytes a second."""

    memory: float
    flops: float
    bandwidth: float
    source: str


DEVICES = {
    "h200": Device(memory=141e9, flops=989e12, bandwidth=4.8e12, source="NVIDIA H200 datasheet, SXM"),
    "h100": Device(memory=80e9, flops=989e12, bandwidth=3.35e12, source="NVIDIA H100 datasheet, SXM"),
    "a100-80": Device(memory=80e9, flops=312e12, bandwidth=2.039e12, source="NVIDIA A100 datasheet, SXM"),
    "a100-40": Device(memory=40e9, flops=312e12, bandwidth=1.555e12, source="NVIDIA A100 datasheet, SXM"),
    "l40s": Device(memory=48e9, flops=362e12, bandwidth=0.864e12, source="NVIDIA L40S datasheet"),
    "l4": Device(memory=24e9, flops=121e12, bandwidth=0.3e12, source="NVIDIA L4 datasheet"),
    "4090": Device(memory=24e9, flops=165e12, bandwidth=1.008e12, source="NVIDIA Ada architecture whitepaper"),
    "3090": Device(memory=24e9, flops=71e12, bandwidth=0.936e12, source="NVIDIA GA102 architecture whitepaper"),
}

PRODUCT_SHARE = 0.4
"""Share of the published FLOP/s that products are assumed to reach. No GPU has run this yet."""
BANDWIDTH_SHARE = 0.7
"""The same of the published bandwidth, for all other operations."""
CONTEXT_BYTES = 600e6
"""What CUDA's context and its libraries take of a GPU's memory; assumed."""

RUNTIME_BYTES = 120e6
"""What a process on a CPU takes beside tensors once it computes: tokenizer, rows, threads, pages of libraries that were
not used before. Measured on two AMD cores, as is the next one."""
CODE_BYTES = 350e3
"""What oneDNN's code for one shape of a product of 16-bit numbers takes."""
AMX_CODE_BYTES = 950e3
"""The same on a processor with AMX: 245 MB for the 256 shapes that are cached, on two Intel cores (docs/costs.md)."""


def seconds_on(device: Device, *, flop: float, moved: float) -> float:
    """Seconds of an operation by whichever of products and memory takes longer."""
    return max(flop / (device.flops * PRODUCT_SHARE), moved / (device.bandwidth * BANDWIDTH_SHARE))
