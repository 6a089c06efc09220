"""One thread a test, and signal handlers put back: a stage installs its own."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from tests.tiny import tiny_spec
from tests.unit.training.ppo_bench import Bench, bench_in


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models of width 32 gain nothing from threads, and lose a lot where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """SIGTERM ends pytest again after a test."""
    names = (signal.SIGTERM, signal.SIGUSR1)
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    """A stage under way, alone."""
    return StageContext(spec=tiny_spec(tmp_path, SftConfig()), rank=0, world_size=1)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    """Makes PPO stages on a tiny model."""
    return bench_in(tmp_path)
