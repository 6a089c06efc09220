"""Figures that are means over learned tokens count those of all processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chained import LORA, Chained
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs, steadied
from tests.noisy import lines


@pytest.mark.parametrize("kind", ["sft", "cpt"])
def test_figures_of_tokens_are_those_of_one_process(tmp_path: Path, kind: str) -> None:
    """Each row is a micro-batch, and the two processes learn from rows of different lengths in each."""
    config: Any = steadied(kind, LORA)
    config = replace(config, optim=replace(config.optim, micro_batch_tokens=1, max_steps=2))
    runs = []
    for together in (False, True):
        chained = Chained(tmp_path / str(together))
        spec = chained.spec(kind, LORA, config=config)
        if together:
            assert on_processes(spec) == [0, 0], logs(spec)
        else:
            chained.run(kind, LORA, config=config)
        runs.append(lines(spec))
    alone, both = runs
    assert len(both) == len(alone) > 1
    for line, other in zip(both, alone, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
