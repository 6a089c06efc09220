"""Builds the device's library once for each version of its source and each torch, which takes some seconds. It needs a
C++ compiler and a torch without CUDA. Nothing here imports torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "native"
COMPILER = os.environ.get("CXX", "g++")
_FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-w")


def missing() -> str:
    if sys.platform != "linux":
        return "a device is simulated on Linux only"
    if shutil.which(COMPILER) is None:
        return f"there is no C++ compiler ({COMPILER}) to build a simulated device with"
    version = (_torch() / "version.py").read_text(encoding="utf-8")
    if not re.search(r"^cuda\b.*= None$", version, re.MULTILINE):
        return "this torch has CUDA itself, so none is simulated"
    return ""


def built() -> tuple[Path, Path]:
    """The library, and the file that says which operators CUDA has.

    Raises:
        RuntimeError: the compiler failed; the message ends with its own.
    """
    torch = _torch()
    folder = _cache() / _version(torch)
    library, operators = folder / "device.so", folder / "operators.txt"
    if library.exists():
        return library, operators
    folder.mkdir(parents=True, exist_ok=True)
    _write_operators(torch, operators)
    _compile(torch, library)
    return library, operators


def _compile(torch: Path, library: Path) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}")
    include = [f"-I{SOURCES}", f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib", "-Wl,--no-as-needed"]
    source = str(SOURCES / "device.cpp")
    command = [COMPILER, *_FLAGS, *include, source, "-o", str(unfinished), *link]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    unfinished.rename(library)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is installed with this project"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "alignment" / "simulated_device"


def _version(torch: Path) -> str:
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    # The path too, because the library looks for torch's own where it was built.
    texts += [(torch / "version.py").read_bytes(), Path(__file__).read_bytes(), str(torch).encode()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def _write_operators(torch: Path, path: Path) -> None:
    import yaml

    text = (torch.parent / "torchgen/packaged/ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    entries = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].split("(")[0]: entry for entry in entries}
    lines = []
    for name, entry in by_name.items():
        delegate = by_name[entry["structured_delegate"]] if entry.get("structured_delegate") else entry
        keys = _dispatch_keys(entry, by_name)
        has_cuda = not keys or any(key == "CUDA" or key.startswith("Composite") for key in keys)
        unchecked = "NoCheck" in (entry.get("device_check"), delegate.get("device_check"))
        lines.append(f"aten::{name} {int(has_cuda) + 2 * int(unchecked)}\n")
    path.write_text("".join(lines), encoding="utf-8")


def _dispatch_keys(entry: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> set[str]:
    if entry.get("ufunc_inner_loop"):
        return {"CPU", "CUDA"}
    keys = {key.strip() for listed in entry.get("dispatch", {}) for key in listed.split(",")}
    delegate = entry.get("structured_delegate")
    return keys | (_dispatch_keys(by_name[delegate], by_name) if delegate else set())
