"""One canonical form for what defines a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from alignment.config.adapter import AdapterKind
from alignment.config.scoring import ScorerConfig
from alignment.core.fingerprint import IF_SET, canonical, digest
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.config import SftConfig


class Colour(Enum):
    """An enum whose value is no text."""

    red = 1


def test_order_of_keys_and_the_writing_of_numbers_do_not_count() -> None:
    assert digest({"a": 1, "b": 2.0}) == digest({"b": 2, "a": 1.0})
    assert digest({"a": (1, 2)}) == digest({"a": [1, 2]})
    assert digest({"a": "1"}) != digest({"a": 1})
    assert digest({"a": True}) != digest({"a": 1})


def test_enums_stand_for_their_values() -> None:
    assert canonical([AdapterKind.lora, Colour.red]) == ["lora", 1]


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), float("inf"), object(), b"x"])
def test_what_has_no_stable_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="no stable form"):
        digest({"a": value})


def test_fields_that_change_no_result_are_left_out() -> None:
    config = SftConfig()
    form = canonical(config)
    for part, section, names in (
        (config, form, ("init", "log_every", "save_every")),
        (config.optim, form["optim"], ("micro_batch_tokens",)),
        (config.data, form["data"], ("source",)),
    ):
        for name in names:
            assert hasattr(part, name)
            assert name not in section
    assert canonical(DpoConfig(beta=0.1)) != canonical(DpoConfig(beta=0.2))


def test_entries_of_a_list_of_groups_count_one_by_one_and_in_order() -> None:
    by_reward, by_length = ScorerConfig(weight=2.0), ScorerConfig(source="length", target=20)
    entries = canonical(PpoConfig(scorers=[by_reward, by_length]))["scorers"]
    assert entries[0] == {
        "source": "reward",
        "weight": 2,
        "normalize": False,
        "clip": None,
        "pattern": None,
        "target": None,
    }
    assert canonical(PpoConfig(scorers=[by_length, by_reward]))["scorers"] == entries[::-1]
    assert digest(PpoConfig(scorers=[by_reward])) != digest(PpoConfig(scorers=[ScorerConfig(weight=2.5)]))


@dataclass(kw_only=True)
class Settings:
    old: int = 1
    newer: dict[str, int] = field(default_factory=dict, metadata=IF_SET)
    newest: int | None = field(default=None, metadata=IF_SET)


def test_a_setting_that_came_later_counts_only_if_it_is_set() -> None:
    assert canonical(Settings()) == {"old": 1}
    assert canonical(Settings(newer={"a": 1})) == {"old": 1, "newer": {"a": 1}}
    assert canonical(Settings(newest=0)) == {"old": 1, "newest": 0}
