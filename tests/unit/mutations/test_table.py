"""The table of deliberate faults fits the source as it is: `make mutations` then runs it."""

from __future__ import annotations

from collections import Counter

from tests.mutations.table import MUTATIONS
from tests.mutations.trial import ROOT


def test_every_fault_can_still_be_put_where_it_belongs() -> None:
    assert [f"{mutation.name}: {fault}" for mutation in MUTATIONS if (fault := mutation.fault(ROOT))] == []
    assert [mutation.name for mutation in MUTATIONS if mutation.old == mutation.new] == []


def test_names_are_used_once() -> None:
    assert [name for name, count in Counter(mutation.name for mutation in MUTATIONS).items() if count > 1] == []
