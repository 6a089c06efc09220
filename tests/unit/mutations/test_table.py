"""The table of deliberate faults fits the source as it is: `make mutations` then runs it."""

from __future__ import annotations

from collections import Counter

from tests.mutations.table import MUTATIONS
from tests.mutations.trial import ROOT


def test_every_fault_can_still_be_put_where_it_belongs() -> None:
    assert [f"{one.name}: {fault}" for one in MUTATIONS if (fault := one.fault(ROOT))] == []
    assert [one.name for one in MUTATIONS if one.old == one.new] == []


def test_names_are_used_once() -> None:
    assert [name for name, count in Counter(one.name for one in MUTATIONS).items() if count > 1] == []
