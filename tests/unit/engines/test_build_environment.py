"""Environments of engines are built with venv and pip; here from packages that the tests make."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from alignment.core.resources import shipped
from alignment.engines import build_environment
from alignment.engines.engine_environment import ENGINES, interpreter


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ALIGNMENT_ENGINE_PYTHON", raising=False)
    return tmp_path


def wheel(folder: Path, name: str) -> Path:
    """A wheel of a package that holds nothing."""
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        archive.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.dist-info/RECORD", "")
    return path


def test_an_environment_has_its_engine_and_not_what_does_not_fit(cache: Path, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("".join(f"{wheel(tmp_path, name)}\n" for name in ("vllm", "torchaudio")))
    assert build_environment.main(["vllm", "--requirements", str(requirements)]) == 0
    python = interpreter(None, package="vllm", where="sampling.python")
    assert python == cache / "alignment/engines/vllm/bin/python"
    for name, code in (("vllm", 0), ("torchaudio", 1)):
        assert subprocess.run([python, "-c", f"import {name}"], check=False, capture_output=True).returncode == code


def test_a_file_that_is_not_there_is_refused(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_environment.main(["vllm", "--requirements", "none.txt"]) == 2
    error = capsys.readouterr().err
    assert "--requirements: no file none.txt\n  → the shipped files are llama-cpp, vllm, vllm-cpu" in error
    assert not (cache / "alignment").exists()


def test_what_pip_cannot_install_is_named(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{tmp_path / 'absent-1-py3-none-any.whl'}\n")
    assert build_environment.main(["llama-cpp", "--requirements", str(requirements)]) == 2
    error = capsys.readouterr().err
    assert f"-m pip install --quiet --disable-pip-version-check --requirement {requirements}: failed" in error


@pytest.mark.parametrize(("tool", "name"), [("/usr/bin/nvidia-smi", "vllm.txt"), (None, "vllm-cpu.txt")])
def test_the_build_of_vllm_suits_the_machine(tool: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: tool)
    assert build_environment.requirements_of("vllm") == shipped("launch") / "engines" / name
    assert build_environment.requirements_of("llama-cpp").name == "llama-cpp.txt"


def test_every_engine_has_requirements() -> None:
    assert all((shipped("launch") / "engines" / f"{engine}.txt").is_file() for engine in ENGINES)
