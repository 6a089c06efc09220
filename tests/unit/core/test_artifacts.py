"""An artifact is complete or does not count."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from alignment.core.artifacts import MANIFEST, Manifest, folder_name, publish, read_manifest, verify, write_json
from alignment.core.errors import ArtifactError, StageError

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


@pytest.mark.parametrize("left", ["", MANIFEST, ".words.json.1234.tmp"])
def test_a_folder_without_a_file_is_not_published(tmp_path: Path, left: str) -> None:
    """``verify`` would reject the artifact in every later command."""
    (tmp_path / "work/empty").mkdir(parents=True)
    if left:
        (tmp_path / "work" / left).touch()
    with pytest.raises(StageError, match=r"wrote no file.*\n.*write at least one file into context\.content"):
        publish(tmp_path / "work", tmp_path / "made", EMPTY)
    assert not (tmp_path / "made").exists()


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
    with pytest.raises(ArtifactError, match=r"its manifest names a file outside the folder: '\.\./secret'"):
        verify(tmp_path / "made", content=True)


ODD: dict[str, Any] = {
    "identity": [],
    "inputs": {"init": 7},
    "base": "self",
    "adapters": {"0": "a"},
    "adapters_stood": {"adapters/0-sft": {"merged": "yes"}},
    "metrics": {"loss": "low"},
    "fingerprint": 7,
    "files": ["model/weights"],
}


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "null", '"x"', '{"stage": "sft"}', '{"unknown": 1}', "\udcff", "[" * 100_000),
        *(json.dumps(asdict(EMPTY) | {name: value}) for name, value in ODD.items()),
    ],
)
def test_a_manifest_of_another_form_is_unreadable_and_nothing_else(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match="unreadable") as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(tmp_path / MANIFEST)


def test_a_manifest_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    """Deleting it would destroy a result that another version can use."""
    (tmp_path / MANIFEST).write_text(json.dumps(asdict(EMPTY) | {"added": 1}))
    with pytest.raises(ArtifactError, match="by a newer version of this program, which added added") as caught:
        read_manifest(tmp_path)
    assert "delete" not in caught.value.remedy


def test_a_folder_in_the_place_of_a_manifest_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match="unreadable: not a regular file"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lists no files, so it cannot be checked"),
        ({"model/weights": {}}, "missing or cut short"),
        ({"model/weights": {"size": 7}}, "content differs from its manifest"),
        ({"model/weights": {"size": "7", "sha256": "x"}}, "missing or cut short"),
        ({"../other": {"size": 1}}, "names a file outside"),
        ({"/etc/passwd": {"size": 1}}, "names a file outside"),
        ({"model\0": {"size": 1}}, "names an impossible file"),
        ({"x" * 300: {"size": 1}}, "names an impossible file"),
        ({"model": {"size": 1}}, "missing or cut short"),
    ],
)
def test_what_a_manifest_lists_is_there_or_the_artifact_is_refused(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    """A manifest that lists nothing would stand for any folder."""
    content(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(asdict(EMPTY) | {"files": files}))
    with pytest.raises(ArtifactError, match=message) as caught:
        verify(tmp_path, content=True)
    assert str(tmp_path) in caught.value.where


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
