"""One thread a test; a stage under way, what its trainer hands to callbacks, and stages of PPO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainerState, TrainingArguments

from alignment.stages.sft.kind import SftConfig
from alignment.training.context import StageContext
from tests.tiny import tiny_spec
from tests.unit.training.ppo_bench import Bench, bench_in


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return StageContext(spec=tiny_spec(tmp_path, SftConfig()), rank=0, world_size=1)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return bench_in(tmp_path)


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to="none")


def at_step(step: int, max_steps: int = 100) -> TrainerState:
    state = TrainerState()
    state.global_step, state.max_steps = step, max_steps
    return state
