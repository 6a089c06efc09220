"""The machine's processors, memory and accelerators, and the versions of libraries."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
"""Variables that name the GPUs to use; the second is ROCm's own, and ROCm reads the first only without it."""

_ROCR = "ROCR_VISIBLE_DEVICES"
"""Names the GPUs that a ROCm process has at all; the variables above then count among these."""


def visible_devices(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> list[str]:
    """GPUs that this machine lets us use, as ``CUDA_VISIBLE_DEVICES`` names them. An invalid name ends the list, as it
    does for CUDA."""
    is_rocm = (root / "dev" / "kfd").exists() and not _num_nvidia(root)
    for name in reversed(VISIBLE) if is_rocm else VISIBLE:
        if name in environment:
            return _names(environment[name])
    return [str(number) for number in range(_num_nvidia(root) or _num_amd(environment, root) or _num_wsl(root))]


def _names(listed: str) -> list[str]:
    names = (part.strip() for part in listed.split(","))
    return list(itertools.takewhile(lambda part: part not in ("", "-1"), names))


def only_visible(devices: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that let a process see only these GPUs: all that name some here, or the first if none does."""
    variables = [name for name in VISIBLE if name in environment] or [VISIBLE[0]]
    return dict.fromkeys(variables, ",".join(devices))


def _num_nvidia(root: Path) -> int:
    return sum(1 for path in (root / "dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def _num_amd(environment: Mapping[str, str], root: Path) -> int:
    """The kernel lists the GPUs of the whole machine; ``ROCR_VISIBLE_DEVICES`` leaves some, which are counted anew."""
    if not (root / "dev" / "kfd").exists():
        return 0
    nodes = (root / "sys" / "class" / "kfd" / "kfd" / "topology" / "nodes").glob("*/properties")
    ours = sum(1 for node in nodes if _is_our_gpu(node))
    return min(ours, len(_names(environment[_ROCR]))) if _ROCR in environment else ours


def _is_our_gpu(node: Path) -> bool:
    """Processors have nodes too, without SIMD units. The kernel lets nobody read that of a GPU outside of its control
    group."""
    try:
        properties = node.read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^simd_count [1-9]", properties, re.MULTILINE) is not None


def _num_wsl(root: Path) -> int:
    """Windows' subsystem for Linux has one file for GPUs of every vendor; NVIDIA's tool lists those with CUDA."""
    tool = root / "usr" / "lib" / "wsl" / "lib" / "nvidia-smi"
    if not (root / "dev" / "dxg").exists() or not tool.exists():
        return 0
    return _listed(tool)


@functools.lru_cache(maxsize=1)
def _listed(tool: Path) -> int:
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(1 for line in listed.splitlines() if line.startswith("GPU "))


def count_devices() -> int:
    """Number of GPUs that this machine lets us use."""
    return len(visible_devices())


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> float:
    """Bytes of this machine's memory that are free or can be freed, and that the control groups of this process leave.
    A container, or a job of Slurm, has such a group with a limit of its own."""
    return max(0.0, min([float(psutil.virtual_memory().available), *_left_by_groups(root)]))


def resident_peak(process: int | str = "self") -> float | None:
    """The largest resident memory of a process in bytes; None where the system does not say, or if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return None
    line = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return float(line[1]) * 1024 if line else None


def _left_by_groups(root: Path) -> Iterator[float]:
    """Bytes that each group above this process leaves; files that the system holds in memory can be freed."""
    mounted = root / "sys" / "fs" / "cgroup"
    try:
        own = re.search(r"^0::/(.*)$", (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return
    for group in [mounted / own[1], *(mounted / own[1]).parents] if own else []:
        if group.is_relative_to(mounted) and (left := _left_by_group(group)) is not None:
            yield left


def _left_by_group(group: Path) -> float | None:
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        files = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return float(limit - used + (int(files[1]) if files else 0))


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies in bfloat16; without, products in that format take longer than in float32. True
    where the system does not say, as on a Mac."""
    flags = _processor_flags(cpuinfo)
    return not flags or bool(flags & {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})


def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies tiles of 16-bit numbers (Intel's AMX)."""
    return "amx_bf16" in _processor_flags(cpuinfo)


def _processor_flags(cpuinfo: Path) -> set[str]:
    """What the processor can do, as the system names it; empty where it does not say."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[:1]).split())


TRAINING_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""What a stage imports and the driver does not."""
PACKAGES = ("alignment-pipeline", *TRAINING_LIBRARIES)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    installed = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # our own, when it runs from a folder
            installed[package] = "not installed"
    return installed
