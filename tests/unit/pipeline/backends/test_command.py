"""The command that runs a stage: the launcher that suits the machine, and what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.config.backend import MachinesBackend
from alignment.config.launch import LaunchConfig, LauncherKind, Sharding
from alignment.core.errors import ConfigError
from alignment.core.hardware import visible_devices
from alignment.core.resources import shipped
from alignment.pipeline.backends import command
from alignment.pipeline.backends.command import with_processes

STAGE_FILE = Path("/runs/r/dpo/stage.yaml")


def argv(launch: LaunchConfig, *, num_devices: int) -> str:
    made = command.of_stage(launch, STAGE_FILE, devices=[str(number) for number in range(num_devices)], num_cores=8)
    assert made.argv[0] == sys.executable
    return " ".join(made.argv[1:])


WORKER = "-m alignment.worker /runs/r/dpo/stage.yaml"
ACCELERATE = "-m accelerate.commands.launch --config_file {} --num_processes {}"
TORCHRUN = "-m torch.distributed.run --standalone --nnodes 1 --nproc_per_node {}"
LOCAL, DDP = (str(shipped("launch") / "accelerate" / name) for name in ("local.yaml", "ddp.yaml"))


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 0, WORKER),
        ({"kind": LauncherKind.accelerate}, 0, f"{ACCELERATE.format(LOCAL, 1)} --cpu {WORKER}"),
        ({"num_processes": 2}, 0, f"{TORCHRUN.format(2)} {WORKER}"),
        ({}, 4, WORKER),
        ({"kind": LauncherKind.accelerate}, 4, f"{ACCELERATE.format(LOCAL, 1)} {WORKER}"),
        ({"num_processes": 4}, 4, f"{ACCELERATE.format(DDP, 4)} --main_process_port 0 {WORKER}"),
        ({"kind": LauncherKind.torchrun}, 0, f"{TORCHRUN.format(1)} {WORKER}"),
        ({"kind": LauncherKind.torchrun, "num_processes": 4}, 4, f"{TORCHRUN.format(4)} {WORKER}"),
        ({"sharding": Sharding.zero2, "num_processes": 4}, 4, f"{TORCHRUN.format(4)} {WORKER}"),
        ({"sharding": Sharding.zero3}, 1, f"{TORCHRUN.format(1)} {WORKER}"),
        ({"sharding": Sharding.fsdp, "num_processes": 2}, 0, f"{TORCHRUN.format(2)} {WORKER}"),
        (
            {"num_processes": 8, "backend": MachinesBackend(machine_rank=1, main_address="10.0.0.1", main_port=4000)},
            8,
            "-m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 4000 "
            f"--nproc_per_node 8 {WORKER}",
        ),
    ],
)
def test_the_launcher_suits_the_machine(settings: dict[str, Any], devices: int, expected: str) -> None:
    assert argv(LaunchConfig(**settings), num_devices=devices) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "devices", "why"),
    [
        ("accelerate", {"num_processes": 2}, 0, "accelerate starts only one process"),
        ("accelerate", {"sharding": Sharding.zero2}, 1, "zero2 needs a process group"),
        ("accelerate", {"backend": MachinesBackend()}, 1, "several machines need torchrun"),
        ("direct", {"num_processes": 2}, 2, "2 processes need a launcher"),
        ("direct", {"sharding": Sharding.fsdp}, 1, "fsdp needs a process group"),
        ("direct", {"backend": MachinesBackend()}, 1, "several machines need torchrun"),
    ],
)
def test_what_a_launcher_does_not_start_is_refused(kind: str, settings: dict[str, Any], devices: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        argv(LaunchConfig(kind=LauncherKind(kind), **settings), num_devices=devices)
    assert "launch.kind=torchrun" in caught.value.remedy


def test_one_process_for_each_gpu_is_counted_and_refused_without_any() -> None:
    launch = LaunchConfig(num_processes=0, backend=MachinesBackend())
    assert with_processes(launch, num_devices=4).num_processes == 4
    assert with_processes(launch, num_devices=4).world_size == 8
    assert with_processes(LaunchConfig(num_processes=3), num_devices=4).num_processes == 3
    with pytest.raises(ConfigError, match="this machine has no GPU") as caught:
        with_processes(launch, num_devices=0)
    assert "launch.num_processes=2" in caught.value.remedy


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 processes, but this machine has 2 GPUs"):
        argv(LaunchConfig(num_processes=4), num_devices=2)


@pytest.mark.parametrize(("processes", "threads", "expected"), [(1, 0, "8"), (2, 0, "4"), (16, 0, "1"), (2, 3, "3")])
def test_threads_are_shared_out_evenly_unless_told(processes: int, threads: int, expected: str) -> None:
    made = command.of_stage(LaunchConfig(num_processes=processes, threads=threads), STAGE_FILE, devices=(), num_cores=8)
    assert made.environment["OMP_NUM_THREADS"] == expected


@pytest.mark.parametrize(("divides", "expected"), [(True, "1"), (False, "0")])
def test_a_worker_is_told_whether_threads_have_rows_of_their_own(
    monkeypatch: pytest.MonkeyPatch, divides: bool, expected: str
) -> None:
    monkeypatch.setenv("ALIGNMENT_DIVIDE_ROWS", "of an earlier shell")
    made = command.of_stage(LaunchConfig(divide_rows=divides), STAGE_FILE, devices=(), num_cores=2)
    assert made.environment["ALIGNMENT_DIVIDE_ROWS"] == expected


@pytest.mark.parametrize(
    ("chosen", "processes", "expected"),
    [
        ({}, 1, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({}, 2, {"CUDA_VISIBLE_DEVICES": "0,1"}),
        ({"CUDA_VISIBLE_DEVICES": "5,2,7"}, 2, {"CUDA_VISIBLE_DEVICES": "5,2"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1, {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        ({"HIP_VISIBLE_DEVICES": "3,1"}, 1, {"HIP_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, {}),
    ],
)
def test_a_worker_sees_as_many_gpus_as_there_are_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], processes: int, expected: dict[str, str]
) -> None:
    (tmp_path / "dev").mkdir()
    for number in range(4):
        (tmp_path / f"dev/nvidia{number}").touch()
    names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    devices = visible_devices(root=tmp_path)
    made = command.of_stage(LaunchConfig(num_processes=processes), STAGE_FILE, devices=devices, num_cores=8).environment
    assert {name: made[name] for name in names if name in made} == expected
    assert made["ALIGNMENT_DEVICE"] == ("cuda" if expected else "cpu")
