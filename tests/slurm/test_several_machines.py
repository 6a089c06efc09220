"""A stage on two machines of a real Slurm, two processes each: as four processes, asked to save, and a lost machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Align
from tests.oracles.close import close
from tests.slurm.cluster import Cluster, commands_of, running
from tests.slurm.test_chain import checkpoints, jobs, started

SFT = (
    "~stages.dpo",
    "~stages.evaluate",
    "~stages.report",
    "launch=ddp",
    "stages.sft.optim.epochs=40",  # 120 steps: long enough to be caught in the middle
)
SLURM = (
    *SFT,
    "launch/backend=slurm",
    "launch.backend.num_machines=2",
    "launch.num_processes=2",
    "launch.backend.time=0:30:00",
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("pair"), "first", "second") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def make(pair: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Align]:
    """A command with an empty output folder; all have one model."""
    return commands_of(pair, tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(make: Callable[[], Align]) -> Align:
    align = make()
    align("run", *SFT, "launch.num_processes=4")
    return align


def test_two_machines_of_a_job_make_what_four_processes_make(
    make: Callable[[], Align], pair: Cluster, undisturbed: Align
) -> None:
    align = make()
    align("run", *SLURM)
    assert pair.state(jobs(align)["sft"]) == "COMPLETED"
    assert align.weights() == undisturbed.weights()
    assert "machine 1 of 2 is waiting for the first machine to start it" in log_of(align)


@pytest.mark.parametrize(
    "is_lost", [False, True], ids=["asked to save, as before its time is over", "a machine is lost"]
)
def test_interrupted_it_is_queued_again_and_ends_the_same(
    is_lost: bool, make: Callable[[], Align], pair: Cluster, undisturbed: Align
) -> None:
    align = make()
    with started(align, SLURM) as waiting:
        pair.wait_for(lambda: checkpoints(align), "checkpoint")
        job = jobs(align)["sft"]
        if is_lost:
            pair.lose("second")
        else:
            pair.call("scancel", "--signal=TERM", job)
        pair.wait_for(lambda: pair.state(job) == "PENDING", "job that is queued again")
        if is_lost:
            pair.bring_back("second")
        pair.start_soon(job)
        printed, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 0, printed + log_of(align)
    assert "sft: starts (from checkpoint-" in log_of(align)
    # DDP orders its buckets anew after a start, and a sum over four processes depends on the order.
    close(weights_of(align), weights_of(undisturbed), atol=1e-6)


def weights_of(align: Align) -> torch.Tensor:
    (file,) = align.artifact("sft").glob("adapters/*/adapter_model.safetensors")
    weights = load_file(file)
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def log_of(align: Align) -> str:
    job = jobs(align)["sft"]
    return Path(align.output / f"runs/sft_dpo/sft/slurm-{job}.log").read_text()
