"""Rows of several sources in the shares that were asked for, and parts of rows that lie within one another."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignment.config.data import MixedConfig
from alignment.core.errors import DataError
from alignment.data.mix import mixed, subset


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mixed(own: list[Any], parts: list[tuple[MixedConfig, list[Any]]], *, seed: int = 0) -> list[Any]:
    """The rows at the indices that are chosen."""
    rows = [*own, *(row for _, others in parts for row in others)]
    sizes = [(part, len(others)) for part, others in parts]
    return [rows[index] for index in mixed(len(own), sizes, _generator(seed), where="data")]


def test_shares_are_of_the_whole_and_every_own_row_is_there_once() -> None:
    own, general, code = ([f"{name}{n}" for n in range(1000)] for name in "ogc")
    parts = [(MixedConfig(share=0.2), general), (MixedConfig(share=0.1), code)]
    rows = _mixed(own, parts)
    counts = {name: sum(row[0] == name for row in rows) / len(rows) for name in "ogc"}
    assert counts == pytest.approx({"o": 0.7, "g": 0.2, "c": 0.1}, abs=0.001)
    assert sorted(row for row in rows if row[0] == "o") == sorted(own)
    assert len(set(rows)) == len(rows), "drawn without replacement"
    assert rows != sorted(rows)


def test_counts_and_shares_go_together() -> None:
    parts = [(MixedConfig(count=20), list(range(100, 200))), (MixedConfig(share=0.5), list(range(1000, 2000)))]
    rows = _mixed(list(range(80)), parts)
    assert [sum(low <= row < high for row in rows) for low, high in ((0, 80), (100, 200), (1000, 2000))] == [
        80,
        20,
        100,
    ]


def test_a_source_without_share_and_count_is_mixed_in_whole() -> None:
    own, others = list(range(60)), list(range(100, 140))
    assert sorted(_mixed(own, [(MixedConfig(), others)])) == [*own, *others]
    rows = _mixed(own, [(MixedConfig(), others), (MixedConfig(share=0.2), list(range(1000, 2000)))])
    assert [sum(low <= row < high for row in rows) for low, high in ((0, 60), (100, 140), (1000, 2000))] == [60, 40, 25]


def test_the_seed_decides_which_rows_and_in_which_order() -> None:
    parts = [(MixedConfig(count=5), list(range(100, 200)))]
    own = list(range(20))
    first = _mixed(own, parts)
    assert _mixed(own, parts) == first
    assert _mixed(own, parts, seed=1) != first
    drawn = [{row for row in _mixed(own, parts, seed=seed) if row >= 100} for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != set(range(100, 105)), "its first rows may be all of one kind"


def test_a_source_with_too_few_rows_is_named() -> None:
    with pytest.raises(DataError) as caught:
        mixed(80, [(MixedConfig(count=1), 1), (MixedConfig(share=0.2), 10)], _generator(), where="s.data")
    assert str(caught.value).startswith("s.data.mix[1]: has 10 rows, but 20 are needed\n")


FRACTIONS = (0.001, 0.07, 0.125, 0.25, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("count", [1, 7, 100, 300])
def test_a_smaller_part_lies_within_a_larger_one(count: int) -> None:
    subsets = [subset(count, fraction, _generator()).tolist() for fraction in FRACTIONS]
    for small, large in itertools.pairwise(subsets):
        assert set(small) <= set(large)
    assert subsets[-1] == list(range(count)), "all of it is all rows, in their order"
    for indices in subsets:
        assert indices == sorted(set(indices))


@pytest.mark.parametrize(
    ("count", "fraction", "size"),
    [(300, 0.125, 38), (300, 0.25, 75), (10, 0.01, 1), (100, 0.07, 7), (300, 0.1, 30), (1000, 1e-05, 1), (0, 0.5, 0)],
)
def test_a_part_is_as_large_as_written_rounded_up(count: int, fraction: float, size: int) -> None:
    assert len(subset(count, fraction, _generator())) == size


def test_the_seed_decides_which_rows_a_part_has() -> None:
    first, again, other = (subset(1000, 0.25, _generator(seed)).tolist() for seed in (0, 0, 1))
    assert again == first
    assert other != first
    assert first != list(range(250)), "not just the beginning"


def test_a_seed_draws_what_it_always_drew() -> None:
    parts = [(MixedConfig(count=2), 4), (MixedConfig(share=0.3), 6)]
    assert mixed(5, parts, _generator(), where="data").tolist() == [9, 1, 0, 3, 4, 14, 13, 5, 6, 2]
    assert subset(12, 0.4, _generator()).tolist() == [0, 5, 7, 8, 9]


def _mixed_with_half(count: int) -> Any:
    return mixed(count, [(MixedConfig(count=count // 2), count)], _generator(), where="data")


def _half(count: int) -> Any:
    return subset(count, 0.5, _generator())


@pytest.mark.parametrize(("draw", "bytes_a_row"), [(_half, 8), (_mixed_with_half, 48)])
def test_an_index_is_no_python_integer(draw: Callable[[int], Any], bytes_a_row: int) -> None:
    """Ten million Python integers and a list of them take 400 MB."""

    def peak(count: int) -> int:
        tracemalloc.start()
        draw(count)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)  # imports, and caches
    assert (peak(40_000) - peak(20_000)) / 20_000 <= bytes_a_row
