"""GPUs are found without PyTorch."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from alignment.core.hardware import free_memory, has_amx, has_bfloat16, only_visible, visible_devices


def test_gpus_are_those_that_the_user_names_or_else_all(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert visible_devices({}, tmp_path) == ["0", "1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == ["1"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "3, GPU-a,-1,2"}, tmp_path) == ["3", "GPU-a"]
    assert visible_devices({"HIP_VISIBLE_DEVICES": "2,3"}, tmp_path) == ["2", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    both = {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "2,3"}
    assert visible_devices(both, tmp_path) == ["0", "1", "2", "3"]
    rocm = tmp_path / "rocm"
    (rocm / "dev").mkdir(parents=True)
    (rocm / "dev" / "kfd").touch()
    assert visible_devices(both, rocm) == ["2", "3"], "which ROCm reads first"


@pytest.mark.parametrize(
    ("variables", "rewritten"),
    [
        ([], ["CUDA_VISIBLE_DEVICES"]),
        (["CUDA_VISIBLE_DEVICES"], ["CUDA_VISIBLE_DEVICES"]),
        (["HIP_VISIBLE_DEVICES"], ["HIP_VISIBLE_DEVICES"]),
        (["HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"], ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]),
    ],
)
def test_a_share_of_the_gpus_is_named_by_every_variable_that_names_gpus(
    variables: list[str], rewritten: list[str]
) -> None:
    """One that is left as it is would win: ROCm prefers its own."""
    environment = dict.fromkeys(variables, "4,5,6")
    assert only_visible(["4", "6"], environment) == dict.fromkeys(rewritten, "4,6")


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({}, ["0", "1", "2"]),
        ({"ROCR_VISIBLE_DEVICES": "1,GPU-4f2b"}, ["0", "1"]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "1"}, ["1"]),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3,4"}, ["0", "1", "2"]),
    ],
)
def test_gpus_of_amd_are_those_that_a_job_may_use(
    tmp_path: Path, environment: dict[str, str], visible: list[str]
) -> None:
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for number in range(3):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "properties").write_text("simd_count 256\n")
    (nodes / "3/properties").mkdir(parents=True)  # it cannot be read, like that of a GPU of another job
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert visible_devices(environment, tmp_path) == visible


@pytest.mark.parametrize(
    ("own", "left"),
    [
        ("job/step", 250),  # its own limit of 400, of which 150 are in use that cannot be freed
        ("job", 700),  # that of the group above
        ("other", None),
        ("", None),
    ],
)
def test_free_memory_is_what_the_groups_of_a_process_leave(tmp_path: Path, own: str, left: int | None) -> None:
    groups = tmp_path / "sys/fs/cgroup"
    for name, limit, used in (("job/step", "400", 200), ("job", "1000", 300), ("other", "max", 10)):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(f"{limit}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
    (groups / "job/step/memory.stat").write_text("anon 100\ninactive_file 50\n")
    (groups / "job/memory.stat").write_text("anon 100\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/x\n0::/{own}\n")
    expected = psutil.virtual_memory().available if left is None else left
    assert free_memory(tmp_path) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("text", "amx", "bfloat16"),
    [
        ("flags\t: fpu amx_bf16 amx_tile\n", True, True),
        ("flags\t: fpu avx512_bf16\nflags\t: fpu avx512_bf16\n", False, True),
        ("flags\t: fpu avx2 avx512f\n", False, False),
        ("Features\t: fp asimd bf16\n", False, True),
        ("nothing", False, True),
    ],
)
def test_a_processor_has_what_the_system_says(tmp_path: Path, text: str, *, amx: bool, bfloat16: bool) -> None:
    """Without bfloat16 a plan warns, so it must not be missed where the system says nothing."""
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert (has_amx(file), has_bfloat16(file)) == (amx, bfloat16)
