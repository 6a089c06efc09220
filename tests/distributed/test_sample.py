"""Answers that several processes sample are those of one process, byte by byte, also if they are killed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.job import StageSpec
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs
from tests.generating import sample_spec, sampled

FILES = ("rows.jsonl", "samples.jsonl", "sampling.json")


def content(artifact: Path) -> dict[str, bytes]:
    return {name: (artifact / name).read_bytes() for name in FILES}


def spec_in(folder: Path) -> StageSpec:
    """Five parts, so that one of two processes has a part more."""
    return sample_spec(folder, batch_size=8)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    return content(sampled(tmp_path_factory.mktemp("alone"), batch_size=8))


def test_two_processes_make_what_one_makes(tmp_path: Path, alone: dict[str, bytes]) -> None:
    spec = spec_in(tmp_path)
    assert on_processes(spec) == [0, 0], logs(spec)
    assert content(spec.artifact) == alone


def test_processes_that_are_killed_leave_parts_from_which_one_process_continues(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    spec = spec_in(tmp_path)
    assert on_processes(spec, kill_after=2, killed_when="sampling") == [-9, -9]
    parts = sorted(part.name for part in (spec.work / "checkpoints").glob("part-*.json"))
    assert [part.partition("-")[2].rpartition("-")[0] for part in parts] == ["answering-0", "answering-1"]
    assert on_processes(spec, world_size=1) == [0], logs(spec)
    assert content(spec.artifact) == alone
