"""Writes ``requirements.lock``: the packages of ``constraints.txt`` with hashes, for Linux on x86-64 without a GPU.
``make lock`` calls it. pip says which file of each package it would take under each version of Python, and with which
hash; nothing is installed. torch is left out as in the constraints, because each machine has a build of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.utils import canonicalize_name

from alignment import __version__

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13")
_PATCH = 5
"""The oldest releases of these that all packages take."""
"""Versions of Python that were tried, as in pyproject's classifiers."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 26, 24, 17, 12, 5)), "linux_x86_64")
HEAD = """\
# The packages of constraints.txt with the hashes of their files, for Linux on x86-64 and CPython {pythons}.
# Written by `make lock`; not to be edited. torch comes first, in the build that suits the machine:
#   pip install 'torch{torch}'
#   pip install --require-hashes --no-deps --requirement requirements.lock
#   pip install --no-deps alignment_pipeline-{version}-py3-none-any.whl
"""


@dataclass(kw_only=True, slots=True)
class Locked:
    """A package's version and the SHA-256 of each file that may be installed."""

    version: str
    hashes: set[str] = field(default_factory=set)


def pins(path: Path = CONSTRAINTS) -> dict[str, str]:
    """The version of each package, by its normalised name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def locked(text: str) -> dict[str, Locked]:
    entries = re.findall(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {
        name: Locked(version=version, hashes=set(re.findall(r"sha256:(\S+)", lines)))
        for name, version, lines in entries
    }


def left_to_the_machine(name: str) -> bool:
    """Whether a package is torch, or comes with a build of torch."""
    return name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))


def chosen_files(python: str) -> Mapping[str, tuple[str, str]]:
    """Version and SHA-256 of the file that pip would take of each package under this version of Python."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        command += ["--ignore-installed", "--no-deps", "--target", scratch, "--requirement", str(CONSTRAINTS)]
        command += ["--implementation", "cp", "--python-version", f"{python}.{_PATCH}"]  # 3.11 alone means 3.11.0
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        report = Path(scratch) / "report.json"
        subprocess.run([*command, "--report", str(report)], check=True)
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {
        canonicalize_name(entry["metadata"]["name"]): (
            entry["metadata"]["version"],
            entry["download_info"]["archive_info"]["hashes"]["sha256"],
        )
        for entry in entries
    }


def write(entries: Mapping[str, Locked], *, version: str, torch: str) -> str:
    lines = [HEAD.format(pythons=", ".join(PYTHONS), version=version, torch=torch)]
    for name, entry in sorted(entries.items()):
        hashes = " \\\n".join(f"    --hash=sha256:{value}" for value in sorted(entry.hashes))
        lines.append(f"{name}=={entry.version} \\\n{hashes}\n")
    return "".join(lines)


def main() -> int:
    """Asks pip for every version of Python, and writes the file."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    torch = next(text.removeprefix("torch") for text in requirements if re.match(r"torch\W", text))
    entries: dict[str, Locked] = {}
    for python in PYTHONS:
        for name, (version, digest) in chosen_files(python).items():
            entry = entries.setdefault(name, Locked(version=version))
            assert entry.version == version, f"{name}: {entry.version} and {version}"
            entry.hashes.add(digest)
    LOCK.write_text(write(entries, version=__version__, torch=torch), encoding="utf-8")
    print(f"{LOCK.name}: {len(entries)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
