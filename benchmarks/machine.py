"""On what, and with what code, something was measured. No name and no path of the machine is noted."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
SHARED_CODE = ("setting.py", "measure.py", "measurement.py", "search.py", "search_run.py")
"""Of this folder: how each contestant is started and measured, and how settings are searched."""
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""oneDNN then makes its matrix products as on a CPU that has bf16 vectors but no tiles."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Model name, cores that may be used, and which instructions for bf16 it has."""
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    has = flags.group(1).split() if flags else []
    return {
        "model": name.group(1).strip() if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": {flag: flag in has for flag in ISA_FLAGS},
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Of Python and the packages that matter, where they are installed."""
    installed = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def compiler() -> str | None:
    """The name of the C++ compiler that ``torch.compile`` would call; None where there is none."""
    wanted = os.environ.get("CXX")
    return next((name for name in ((wanted,) if wanted else ("g++", "clang++", "c++")) if shutil.which(name)), None)


def code_sha256() -> str:
    """Of all Python files of the project and of these benchmarks: whether two measurements ran the same code."""
    digest = hashlib.sha256()
    for folder in ("alignment", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ".environments" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def contestant_sha256(module: str) -> str:
    """Of the code that a search runs: a module of ``contestants/``, what it imports from there, and ``SHARED_CODE``.
    Comments and docstrings do not count."""
    folder = ROOT / "benchmarks"
    waiting, files = [module], [folder / name for name in SHARED_CODE]
    while waiting:
        file = folder / "contestants" / f"{waiting.pop()}.py"
        if file not in files:
            files.append(file)
            waiting += re.findall(r"^from benchmarks\.contestants\.(\w+) import", file.read_text("utf-8"), re.MULTILINE)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0{_statements(path.read_text('utf-8'))}".encode())
    return digest.hexdigest()


def _statements(code: str) -> str:
    """The code without comments and without strings that stand alone."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                statement
                for statement in node.body
                if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
            ]
    return ast.dump(tree)


def uncommitted_code(root: Path = ROOT) -> list[str]:
    """Python files of the project and of these benchmarks that differ from the commit; none where there is no git."""
    command = ["git", "-C", str(root), "status", "--porcelain", "--", "alignment/*.py", "benchmarks/*.py"]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line[3:] for line in status.stdout.splitlines()] if status.returncode == 0 else []


def scrubbed(text: str) -> str:
    """The text without addresses and folders, so that a reason can be published."""
    text = re.sub(r"\b\w+://\S+", "(address)", text)
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)
