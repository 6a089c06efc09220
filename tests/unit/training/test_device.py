"""The launcher and PyTorch have to agree on the device of a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignment import worker
from alignment.core.errors import ConfigError
from alignment.stages.sft.config import SftConfig
from alignment.training.device import own_device
from tests.tiny import tiny_spec

Machine = Callable[..., None]
ON_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to use the CPU"
ON_GPU_OR_CPU = "set CUDA_VISIBLE_DEVICES=0 to use a GPU, or CUDA_VISIBLE_DEVICES= (empty) to use the CPU"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets what the launcher says and how many GPUs PyTorch finds."""

    def set_up(launcher: str | None, gpus: int, *, rank: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.delenv("ALIGNMENT_DEVICE", raising=False)
        if launcher is not None:
            monkeypatch.setenv("ALIGNMENT_DEVICE", launcher)

    return set_up


@pytest.mark.parametrize(
    ("launcher", "gpus", "rank", "expected"),
    [
        ("cpu", 0, 0, "cpu"),
        ("cpu", 0, 1, "cpu"),
        ("cuda", 1, 0, "cuda:0"),
        ("cuda", 4, 3, "cuda:3"),
        (None, 0, 0, "cpu"),
        (None, 2, 1, "cuda:1"),
    ],
)
def test_each_process_has_a_gpu_of_its_own_or_the_cpu(
    machine: Machine, launcher: str | None, gpus: int, rank: int, expected: str
) -> None:
    machine(launcher, gpus, rank=rank)
    assert str(own_device()) == expected


@pytest.mark.parametrize(
    ("launcher", "gpus", "rank", "message", "remedy"),
    [
        ("cpu", 2, 0, "PyTorch finds 2 GPUs, but the launcher found none", ON_GPU_OR_CPU),
        ("cuda", 0, 0, "the launcher found a GPU for process 0 of this machine, but PyTorch .* finds none", ON_CPU),
        ("cuda", 1, 1, "the launcher found a GPU for process 1 of this machine, but PyTorch .* finds 1 GPU$", ON_CPU),
    ],
)
def test_a_device_that_the_launcher_did_not_find_is_refused(
    machine: Machine, launcher: str, gpus: int, rank: int, message: str, remedy: str
) -> None:
    machine(launcher, gpus, rank=rank)
    with pytest.raises(ConfigError, match="(?m)" + message) as caught:
        own_device()
    assert remedy in caught.value.remedy


def test_a_worker_ends_on_a_mismatch_before_anything_is_loaded(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec(tmp_path, SftConfig())
    monkeypatch.setattr(worker, "read_spec", lambda path: spec)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "function_of", lambda kind: pytest.fail("a stage began"))
    machine("cpu", 1)
    assert worker.main(tmp_path / "stage.yaml") == 2
    status = json.loads((spec.run_folder / "status.json").read_text())
    assert "PyTorch finds 1 GPU, but the launcher found none" in status["error"]
