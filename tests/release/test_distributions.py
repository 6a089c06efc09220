"""The wheel and the source archive hold the tracked files of their folders, and nothing else."""

from __future__ import annotations

import email
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import hatchling.build
import pytest
from packaging.requirements import Requirement

from alignment import __version__

ROOT = Path(__file__).parents[2]
NAME = f"alignment_pipeline-{__version__}"
SHIPPED = ("conf", "data", "launch", "recipes")
"""Folders that the wheel has copies of, as ``alignment/_shipped/<name>``."""
IN_ARCHIVE = ("alignment", *SHIPPED, "docs")
AT_ITS_TOP = {
    *(".gitignore", "PKG-INFO", "pyproject.toml"),
    *(
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "requirements.lock",
    ),
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked(*folders: str) -> set[str]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {path for path in printed.splitlines() if (ROOT / path).is_file()}


def built(folder: Path, target: Path, kind: str) -> Path:
    """The distribution that pip would build from ``folder``."""
    target.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        build = hatchling.build.build_wheel if kind == "wheel" else hatchling.build.build_sdist
        return target / build(str(target))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, tmp_path_factory.mktemp("archive"), "sdist")


def test_the_wheel_holds_the_package_what_ships_beside_it_and_the_licence(wheel: Path) -> None:
    about = {
        f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    }
    copies = {f"alignment/_shipped/{path}" for path in tracked(*SHIPPED)}
    with zipfile.ZipFile(wheel) as opened:
        assert set(opened.namelist()) == tracked("alignment") | copies | about
    assert {"alignment/py.typed", "alignment/report/templates/report.html.j2"} <= tracked("alignment")


def test_the_archive_holds_sources_and_docs_and_neither_tests_nor_caches(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        names = {member.name.removeprefix(f"{NAME}/") for member in opened if member.isfile()}
    assert names == tracked(*IN_ARCHIVE) | AT_ITS_TOP


def test_a_wheel_from_the_archive_is_the_wheel_from_the_clone(wheel: Path, archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    again = built(tmp_path / NAME, tmp_path / "wheel", "wheel")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_metadata_say_what_pyproject_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        metadata = email.message_from_string(opened.read(f"{NAME}.dist-info/METADATA").decode())
        commands = opened.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("alignment-pipeline", __version__)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    plain = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert {r.name for r in plain if r.marker is None} == {Requirement(text).name for text in PROJECT["dependencies"]}
    assert "align = alignment.cli:console_script" in commands
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
