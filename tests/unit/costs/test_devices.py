"""How long an operation is assumed to take on a GPU that is not here."""

from __future__ import annotations

import pytest

from alignment.costs.devices import DEVICES, seconds_on

PRODUCTS = 395.6e12
"""FLOP of an H100 in a second: 40% of the 989e12 that its maker publishes."""
MEMORY = 2.345e12
"""Bytes that it moves in a second: 70% of the 3.35e12 that its maker publishes."""


@pytest.mark.parametrize(
    ("products", "memory", "seconds"), [(3.0, 1.0, 3.0), (1.0, 2.0, 2.0)], ids=["by products", "by memory"]
)
def test_an_operation_takes_as_long_as_the_slower_of_its_products_and_its_memory(
    products: float, memory: float, seconds: float
) -> None:
    taken = seconds_on(DEVICES["h100"], flop=products * PRODUCTS, moved=memory * MEMORY)
    assert taken == pytest.approx(seconds, rel=1e-12)
