"""What a worker finds in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.pipeline.backends import environment
from alignment.pipeline.backends.environment import idle_threads

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def test_what_the_user_has_set_for_the_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    variables = environment.of_worker(2, "")
    assert "MALLOC_TOP_PAD_" not in variables
    defaults = {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    }
    assert defaults <= set(variables)
    assert variables["MALLOC_ARENA_MAX"] == "1"


@pytest.mark.parametrize("chosen", [None, *WAITING])
def test_idle_threads_of_a_worker_sleep_unless_the_user_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv(chosen, "1000")
    variables = environment.of_worker(2, "")
    policies = {name: variables[name] for name in WAITING if name in variables}
    assert policies == (idle_threads() if chosen is None else {})


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: GenuineIntel\n", {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("vendor_id\t: AuthenticAMD\n", {"GOMP_SPINCOUNT": "1000"}),
        (None, {"OMP_WAIT_POLICY": "PASSIVE"}),  # no such file, as on a Mac
    ],
)
def test_how_soon_idle_threads_sleep_is_what_was_measured_for_the_processor(
    tmp_path: Path, cpuinfo: str | None, expected: dict[str, str]
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(f"processor\t: 0\n{cpuinfo}flags\t\t: fpu\n")
    assert idle_threads(file) == expected


def test_the_worker_is_offline_and_finds_our_package_first() -> None:
    variables = environment.of_worker(1, "/theirs")
    assert variables["HF_HUB_OFFLINE"] == variables["TRANSFORMERS_OFFLINE"] == variables["HF_DATASETS_OFFLINE"] == "1"
    assert variables["HF_HUB_DISABLE_TELEMETRY"] == variables["DO_NOT_TRACK"] == "1"
    assert variables["PYTHONPATH"] == f"{Path(__file__).parents[4]}:/theirs"


def test_files_in_the_working_folder_hide_no_module_of_ours(tmp_path: Path) -> None:
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment/__init__.py").write_text("raise SystemExit('this is the user's own file')")
    command = [sys.executable, "-m", "alignment.core.errors"]
    variables = {**os.environ, **environment.of_worker(1, "")}
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
