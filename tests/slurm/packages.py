"""Slurm as Debian packs it, fetched by apt and unpacked into the cache; nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from alignment.pipeline.sources.bundled_model import cache_root

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins")


class Unavailable(Exception):
    """Slurm cannot be had on this machine; says why."""


def unpacked() -> Path:
    """The folder that holds ``usr/bin/sbatch`` and the rest, fetched first if it is not there.

    Raises:
        Unavailable: this is no Debian, or its packages cannot be fetched.
    """
    target = cache_root() / "slurm"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".slurm-") as scratch:
            _fetch(Path(scratch))
            os.replace(Path(scratch) / "root", target)
    return target


def _fetch(scratch: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"it is fetched as Debian's packages, and there is no {tool} here")
    needed = _call(["apt-get", "--simulate", "--no-install-recommends", "install", *PACKAGES], scratch)
    names = {*PACKAGES, *re.findall(r"^Inst (\S+)", needed, re.MULTILINE)}
    _call(["apt-get", "download", *sorted(names)], scratch)
    for archive in sorted(scratch.glob("*.deb")):
        _call(["dpkg", "-x", str(archive), "root"], scratch)


def _call(argv: list[str], folder: Path) -> str:
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{' '.join(argv)} failed:\n{done.stderr.strip()}")
    return done.stdout
