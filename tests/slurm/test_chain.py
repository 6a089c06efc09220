"""A chain of stages as jobs of a real Slurm: it ends well, is interrupted and goes on, fails and is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Align
from tests.slurm.cluster import Cluster

SLURM = (
    "launch/backend=slurm",
    "launch.backend.time=0:30:00",
    "launch.backend.cpus=1",
    "~stages.evaluate",
    "~stages.report",
    "stages.sft.optim.epochs=40",  # 120 steps: long enough to be caught in the middle
)


@pytest.fixture(scope="session")
def undisturbed(new_align: Callable[[], Align]) -> Align:
    align = new_align()
    align("run", *SLURM)
    return align


def jobs(align: Align) -> dict[str, str]:
    submitted: dict[str, str] = json.loads((align.output / "runs/sft_dpo/jobs.json").read_text())
    return submitted


def test_a_chain_of_two_jobs_ends_well(undisturbed: Align, cluster: Cluster) -> None:
    assert undisturbed.states() == {"sft": "done", "dpo": "done"}
    assert all(stage["seconds"] > 0 for stage in undisturbed.stages().values())
    assert {cluster.state(job) for job in jobs(undisturbed).values()} == {"COMPLETED"}
    assert undisturbed.weights()
    again = undisturbed("run", *SLURM)
    assert again.count("reused") == 2
    assert "job" not in again


INTERRUPTIONS = {
    "requeued by Slurm": ("scontrol", "requeue", "JOB"),
    "asked to save, as before its time is over": ("scancel", "--signal=TERM", "JOB"),
    "preempted by a job that is urgent": (
        "sbatch",
        "--partition=urgent",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=:",
    ),
}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_interrupted_in_the_middle_it_goes_on_and_ends_the_same(
    how: str, new_align: Callable[[], Align], undisturbed: Align, cluster: Cluster
) -> None:
    align = new_align()
    with started(align) as waiting:
        cluster.wait_for(lambda: checkpoints(align), "checkpoint")
        job = jobs(align)["sft"]
        cluster.call(*(job if word == "JOB" else word for word in INTERRUPTIONS[how]))
        cluster.wait_for(lambda: cluster.state(job) == "PENDING", "job that is queued again")
        assert checkpoints(align), "the stage was over already"
        assert f"job {job} PENDING" in status(align)
        cluster.start_soon(job)
        printed, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 0, printed
    log = (align.output / f"runs/sft_dpo/sft/slurm-{job}.log").read_text()
    assert "sft: starts (from checkpoint-" in log
    assert align.weights() == undisturbed.weights()
    assert set(cluster_states(align, cluster)) == {"COMPLETED"}


def test_a_cancelled_job_stays_cancelled_and_ends_the_chain(new_align: Callable[[], Align], cluster: Cluster) -> None:
    align = new_align()
    with started(align) as waiting:
        cluster.wait_for(lambda: checkpoints(align), "checkpoint")
        cluster.call("scancel", jobs(align)["sft"])
        printed, _ = waiting.communicate(timeout=600)
    assert waiting.returncode == 75, printed
    assert "ended as CANCELLED" in printed
    cluster.wait_for(lambda: cluster_states(align, cluster) == ["CANCELLED", "CANCELLED"], "end of the chain")


def test_a_stage_that_fails_ends_the_chain_with_its_own_exit_code(
    new_align: Callable[[], Align], cluster: Cluster
) -> None:
    align = new_align()
    printed = align("run", *SLURM, "stages.sft.optim.lr=1e30", code=6)
    assert "stage sft" in printed
    cluster.wait_for(lambda: cluster_states(align, cluster) == ["FAILED", "CANCELLED"], "end of the chain")


def test_what_sbatch_says_when_it_refuses_is_shown(new_align: Callable[[], Align]) -> None:
    printed = new_align()("run", *SLURM, "launch.backend.partition=nowhere", code=2)
    assert "sbatch refused it: sbatch: error: " in printed
    assert "partition" in printed
    assert "Traceback" not in printed


def started(align: Align, overrides: Sequence[str] = SLURM) -> subprocess.Popen[str]:
    """The command at work; it stays until its jobs have ended."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(align.argv("run", *overrides), env=align.environment, **pipes)


def status(align: Align) -> str:
    argv = [sys.executable, "-m", "alignment.cli", "status", align.recipe, "--output", str(align.output)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, env=align.environment).stdout


def checkpoints(align: Align) -> list[Path]:
    """Those of SFT that are complete, while it is at work."""
    return list(align.output.glob("artifacts/sft-*.work/checkpoints/checkpoint-*/alignment_checkpoint.json"))


def cluster_states(align: Align, cluster: Cluster) -> list[str]:
    return [cluster.state(job) for job in jobs(align).values()]
