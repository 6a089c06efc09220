"""An artifact is complete or does not count."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from alignment.artifacts import MANIFEST, Manifest, folder_name, publish, read_manifest, verify, write_json
from alignment.errors import ArtifactError

EMPTY = Manifest(stage="sft", kind="policy", fingerprint="5f0e9b1c" * 8, identity={})


def content(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_a_published_artifact_lists_its_files_and_verifies(tmp_path: Path) -> None:
    target = tmp_path / folder_name("sft", EMPTY.fingerprint)
    publish(content(tmp_path / "work"), target, EMPTY)
    assert target.name == "sft-5f0e9b1c"
    assert not (tmp_path / "work").exists()
    assert set(verify(target, content=True).files) == {"model/weights", "metrics.jsonl"}
    assert (target / "model/weights").stat().st_mode & 0o777 == 0o644


def test_a_complete_artifact_is_never_replaced(tmp_path: Path) -> None:
    publish(content(tmp_path / "work"), tmp_path / "made", EMPTY)
    with pytest.raises(ArtifactError, match="exists and is complete"):
        publish(content(tmp_path / "again"), tmp_path / "made", EMPTY)


def test_a_leftover_without_a_manifest_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/stale").touch()
    publish(content(tmp_path / "work"), tmp_path / "made", EMPTY)
    assert not (tmp_path / "made/stale").exists()


def test_damage_is_found_by_size_and_by_content(tmp_path: Path) -> None:
    publish(content(tmp_path / "work"), tmp_path / "made", EMPTY)
    weights = tmp_path / "made/model/weights"
    weights.write_bytes(b"Weights")
    verify(tmp_path / "made", content=False)
    with pytest.raises(ArtifactError, match="content differs from its manifest"):
        verify(tmp_path / "made", content=True)
    weights.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="missing or cut short"):
        verify(tmp_path / "made", content=False)


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"weights")
    publish(content(tmp_path / "work"), tmp_path / "made", EMPTY)
    manifest = tmp_path / "made" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"model/weights"', '"../secret"'))
    with pytest.raises(ArtifactError, match=r"its manifest names a file outside: '\.\./secret'"):
        verify(tmp_path / "made", content=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"stage": "sft"}', '{"unknown": 1}'])
def test_a_manifest_that_cannot_be_read_says_so(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="unreadable"):
        read_manifest(tmp_path)


def _publish_and_die(work: Path, target: Path, after_renames: int) -> None:
    """Kills this process at the given ``os.replace``, as a power cut would."""
    real, count = os.replace, 0

    def replace(source: Path, destination: Path) -> None:
        nonlocal count
        count += 1
        if count > after_renames:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, destination)

    os.replace = replace  # type: ignore[assignment]
    publish(work, target, EMPTY)


@pytest.mark.parametrize("after_renames", [0, 1])
def test_a_crash_while_publishing_leaves_nothing_that_counts(tmp_path: Path, after_renames: int) -> None:
    work, target = content(tmp_path / "work"), tmp_path / "made"
    process = multiprocessing.get_context("spawn").Process(target=_publish_and_die, args=(work, target, after_renames))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_manifest(target) is None
    with pytest.raises(ArtifactError, match="no complete artifact"):
        verify(target, content=False)


def test_a_json_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n "a": 1\n}\n'
