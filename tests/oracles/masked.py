"""Mean, variance and whitening over counted elements, as loops (Huang et al. 2024, details 8 and 15)."""

from __future__ import annotations

import math

Rows = list[list[float]]
Mask = list[list[bool]]


def counted(values: Rows, mask: Mask) -> list[float]:
    """The elements where the mask is True."""
    return [v for row, keep in zip(values, mask, strict=True) for v, k in zip(row, keep, strict=True) if k]


def mean(values: Rows, mask: Mask) -> float:
    """Arithmetic mean of what counts."""
    elements = counted(values, mask)
    return math.fsum(elements) / len(elements)


def variance(values: Rows, mask: Mask) -> float:
    """Biased variance of what counts."""
    centre = mean(values, mask)
    elements = counted(values, mask)
    return math.fsum((v - centre) ** 2 for v in elements) / len(elements)


def whitened(values: Rows, mask: Mask) -> Rows:
    """(x − mean)/σ where the mask is True, 0 elsewhere."""
    centre, scale = mean(values, mask), math.sqrt(variance(values, mask) + 1e-8)
    return _each(values, mask, lambda v: (v - centre) / scale)


def scaled(values: Rows, mask: Mask) -> Rows:
    """(x − mean)/σ + mean where the mask is True, 0 elsewhere."""
    centre, scale = mean(values, mask), math.sqrt(variance(values, mask) + 1e-8)
    return _each(values, mask, lambda v: (v - centre) / scale + centre)


def _each(values, mask, change):  # type: ignore[no-untyped-def]
    return [
        [change(v) if k else 0.0 for v, k in zip(row, keep, strict=True)]
        for row, keep in zip(values, mask, strict=True)
    ]
