"""A dozen draws of the field test; ``make field`` draws more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import environment
from tests.e2e.forked import Forked
from tests.field.__main__ import Trial, run


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    server = Forked({**environment(), "OMP_NUM_THREADS": "1"})
    yield server
    server.close()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_holds(forked: Forked, seed: int) -> None:
    trial = Trial(forked)
    assert run(trial, number=4, seed=seed) == 0, trial.failed
    assert trial.outcomes["held"] > 0
