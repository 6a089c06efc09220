"""Environment variables of worker processes, in addition to the caller's.

They keep a process offline and free of telemetry, let it find this package first, limit its threads, and make it reuse
its memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from alignment.core import hardware
from alignment.core.files import CODE_ROOT
from alignment.core.processes import without_ranks

CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "16",
}
"""Makes a process reuse the memory of freed tensors. glibc would return it to the system and fetch fresh pages for the
next tensor, which took as long as the arithmetic on it. One heap serves all threads; with a heap each, none would get
what another has freed. By default oneDNN caches code for 1,024 shapes of products, and nearly every batch has new
shapes: gigabytes after a few dozen steps (docs/LOG.md, 2026-11-25). PyTorch holds what it used for 1,024 shapes as
well, which saves no time: .3 GB (docs/LOG.md, 2026-11-28). Variables that the user has set stay."""

WAITING_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""If the user has set one of these, the way in which OpenMP's threads wait is left alone."""
_SPINS_ON_AMD = "1000"


def complete(own: Mapping[str, str]) -> dict[str, str]:
    """All variables of a process: the caller's without its ranks, replaced by its ``own``, with a launcher's ranks."""
    return without_ranks(os.environ) | dict(own)


def of_worker(threads: int, pythonpath: str) -> dict[str, str]:
    """Variables that replace the caller's; ``pythonpath`` is the caller's and is searched after our own folder."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **own_code(pythonpath),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **{name: value for name, value in (CPU_MEMORY | _on_cpu()).items() if name not in os.environ},
        **({} if any(name in os.environ for name in WAITING_SETTINGS) else idle_threads()),
    }


def idle_threads(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Makes OpenMP's idle threads sleep soon. By default they spin for milliseconds, and next to another busy process
    they spin on the core that a working thread needs: training steps took 18 times as long.

    On two Intel cores, sleeping at once cost nothing on a quiet machine. On two AMD cores it cost a fifth, and a short
    spin a twentieth (docs/LOG.md, 2026-11-26).
    """
    with suppress(OSError):
        if "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace"):
            return {"GOMP_SPINCOUNT": _SPINS_ON_AMD}
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def own_code(pythonpath: str) -> dict[str, str]:
    """Variables that make a process find this package first, whatever is in its working folder."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(part for part in (str(CODE_ROOT), pythonpath) if part)}


def _on_cpu() -> dict[str, str]:
    """Without a GPU: DeepSpeed, if it is installed, would warn in every log that it found none. Nothing is compiled at
    run time, but bitsandbytes imports PyTorch's compiler, which takes most of a second in each stage."""
    return {} if hardware.count_devices() else {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
