"""A cluster that is there for all tests of a session, and one run on it that nothing disturbed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Align
from tests.slurm.cluster import Cluster
from tests.slurm.packages import Unavailable, unpacked
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Slurm on this machine. Where it cannot be had, the tests fail with the reason: they were asked for."""
    try:
        packages = unpacked()
    except Unavailable as reason:
        raise pytest.fail.Exception(f"no Slurm to test with: {reason}", pytrace=False) from None
    cluster = Cluster(packages=packages, folder=tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def new_align(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Align]:
    """Makes a command with an empty output folder and one tiny model, which submits its stages to the cluster."""
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")

    def make() -> Align:
        output: Path = tmp_path_factory.mktemp("output")
        return Align(output=output, model=model, recipe="sft_dpo", variables=cluster.environment)

    return make
