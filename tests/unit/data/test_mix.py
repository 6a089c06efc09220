"""Rows of several sources in the shares that were asked for."""

from __future__ import annotations

import pytest
import torch

from alignment.config.data import MixedConfig
from alignment.data.mix import mixed
from alignment.errors import DataError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_are_of_the_whole_and_every_own_row_is_there_once() -> None:
    own, general, code = ([f"{name}{n}" for n in range(1000)] for name in "ogc")
    parts = [(MixedConfig(share=0.2), general), (MixedConfig(share=0.1), code)]
    rows = mixed(own, parts, _generator(), where="data")
    counts = {name: sum(row[0] == name for row in rows) / len(rows) for name in "ogc"}
    assert counts == pytest.approx({"o": 0.7, "g": 0.2, "c": 0.1}, abs=0.001)
    assert sorted(row for row in rows if row[0] == "o") == sorted(own)
    assert len(set(rows)) == len(rows), "drawn without replacement"
    assert rows != sorted(rows)


def test_counts_and_shares_go_together() -> None:
    parts = [(MixedConfig(count=20), list(range(100, 200))), (MixedConfig(share=0.5), list(range(1000, 2000)))]
    rows = mixed(list(range(80)), parts, _generator(), where="data")
    assert [sum(low <= row < high for row in rows) for low, high in ((0, 80), (100, 200), (1000, 2000))] == [
        80,
        20,
        100,
    ]


def test_the_seed_decides_which_rows_and_in_which_order() -> None:
    parts = [(MixedConfig(count=5), list(range(100, 200)))]
    own = list(range(20))
    first = mixed(own, parts, _generator(), where="data")
    assert mixed(own, parts, _generator(), where="data") == first
    assert mixed(own, parts, _generator(1), where="data") != first


def test_a_source_with_too_few_rows_is_named() -> None:
    with pytest.raises(DataError) as caught:
        mixed([1] * 80, [(MixedConfig(count=1), [2]), (MixedConfig(share=0.2), [3] * 10)], _generator(), where="s.data")
    assert str(caught.value).startswith("s.data.mix[1]: 10 rows are there and 20 are wanted\n")
