"""GPUs are found without PyTorch."""

from __future__ import annotations

from pathlib import Path

from alignment.core.hardware import visible_devices


def test_gpus_are_those_that_the_user_names_or_else_all(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert visible_devices({}, tmp_path) == ["0", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == ["1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3, GPU-a,-1,2"}, tmp_path) == ["3", "GPU-a"]
    assert visible_devices({"HIP_VISIBLE_DEVICES": "2,3"}, tmp_path) == ["2", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_gpus_of_amd_are_counted_without_the_processors_beside_them(tmp_path: Path) -> None:
    for number, simds in enumerate((0, 256, 1024)):
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count {8 * (not simds)}\nsimd_count {simds}\n")
    assert visible_devices({}, tmp_path) == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert visible_devices({}, tmp_path) == ["0", "1"]


def test_gpus_under_windows_are_those_that_nvidias_tool_lists(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert visible_devices({}, tmp_path) == []  # a GPU of another make
    tool = tmp_path / "usr/lib/wsl/lib/nvidia-smi"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n[ $1 = -L ] && printf 'GPU 0: A (UUID: GPU-1)\\nGPU 1: B (UUID: GPU-2)\\n'\n")
    tool.chmod(0o755)
    assert visible_devices({}, tmp_path) == ["0", "1"]
