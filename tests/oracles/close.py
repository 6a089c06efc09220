"""Comparison with a bound on how loose it may be."""

from __future__ import annotations

from typing import Any

import torch

MAX_RTOL = 1e-4
MAX_ATOL = 1e-4


def close(actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Asserts that two tensors or nested lists agree elementwise; shapes must agree, dtypes need not. Raises
    ValueError: a tolerance that could hide a fault; AssertionError: they differ."""
    if rtol > MAX_RTOL or atol > MAX_ATOL:
        raise ValueError(f"rtol {rtol} or atol {atol} is too loose; at most {MAX_RTOL} and {MAX_ATOL}")
    left = torch.as_tensor(actual, dtype=torch.float64, device="cpu")
    right = torch.as_tensor(expected, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(left, right, rtol=rtol, atol=atol)
