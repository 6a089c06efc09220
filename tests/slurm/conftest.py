"""A cluster that is there for all tests of a session, and commands that submit to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.conftest import Align
from tests.slurm.cluster import Cluster, commands_of, running


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def new_align(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Align]:
    return commands_of(cluster, tmp_path_factory)
