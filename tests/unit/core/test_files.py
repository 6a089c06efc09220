"""Files and artifacts are written whole or not at all, a full disk is named, and shipped folders are where they lie."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from alignment.core.artifacts import (
    MANIFEST,
    Manifest,
    folder_name,
    publish,
    read_manifest,
    verify,
    write_json,
    write_lines,
)
from alignment.core.errors import ArtifactError, ConfigError, DiskError, StageError
from alignment.core.files import disk_error, explained, is_full, remove_leftovers, replacing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device; "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up; "),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on the device; "),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "no space left"),
        (ValueError("upload refused: File too large"), ""),
        (RuntimeError("unexpected pos of an answer"), ""),
        (RuntimeError("[enforce fail at inline_container.cc:110] . file in archive is not in a subdirectory"), ""),
        (OSError(errno.ENOENT, "No such file", "x"), ""),
    ],
)
def test_every_way_in_which_a_library_reports_a_full_disk_is_understood_and_no_other_error(
    tmp_path: Path, error: Exception, words: str
) -> None:
    behind = RuntimeError("saving failed")
    behind.__cause__ = error
    for reported in (error, behind):
        fault = disk_error(reported, folder=tmp_path)
        assert (fault is not None) is bool(words)
        if fault is not None:
            assert words in fault.message
            assert (fault.exit_code, fault.where) == (12, str(tmp_path))


def test_a_published_artifact_lists_its_files_and_its_damage_is_found(tmp_path: Path) -> None:
    target = tmp_path / folder_name("sft", EMPTY.fingerprint)
    assert target.name == "sft-5f0e9b1c"
    target.mkdir()
    (target / "stale").touch()
    publish(content(tmp_path / "work"), target, EMPTY)
    assert not (tmp_path / "work").exists()
    assert not (target / "stale").exists(), "a leftover without a manifest is replaced"
    assert set(verify(target, content=True).files) == {"model/weights", "metrics.jsonl"}
    weights = target / "model/weights"
    assert weights.stat().st_mode & 0o777 == 0o644
    with pytest.raises(ArtifactError, match="exists and is complete"):
        publish(content(tmp_path / "again"), target, EMPTY)
    weights.write_bytes(b"Weights")
    verify(target, content=False)
    with pytest.raises(ArtifactError, match="content differs"):
        verify(target, content=True)
    weights.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="cut short"):
        verify(target, content=False)


def test_a_manifest_of_a_newer_version_is_not_called_damaged_and_one_that_is_no_file_is(tmp_path: Path) -> None:
    """Deleting it would destroy a result that another version can use."""
    (tmp_path / MANIFEST).write_text(json.dumps(asdict(EMPTY) | {"added": 1}))
    with pytest.raises(ArtifactError, match=r"newer version .* added added") as caught:
        read_manifest(tmp_path)
    assert "delete" not in caught.value.remedy
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_manifest(tmp_path)


def publish_one(folder: Path) -> None:
    content = folder / "content"
    content.mkdir(exist_ok=True)
    (content / "weights").touch()
    publish(content, folder / "made", Manifest(stage="sft", kind="policy", fingerprint="5f" * 32, identity={}))


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run.json": ("run.json", lambda folder: write_json(folder / "run.json", {"state": "failed"})),
    "rows": ("samples.jsonl", lambda folder: write_lines(folder / "samples.jsonl", [{"step": 2}])),
    "manifest": ("content/manifest.json", publish_one),
}


@pytest.mark.parametrize("call", ["open", "write", "rename"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_fails_leaves_the_old_file_alone_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, call: str
) -> None:
    name, write = WRITERS[writer]
    for earlier in ("run.json", "samples.jsonl", "report.html", "metrics.jsonl"):
        (tmp_path / earlier).write_text('{"step": 1}\n')
    _fail(monkeypatch, call)
    with pytest.raises(DiskError, match=r"no space left on the device; .* are free") as caught, explained(tmp_path):
        write(tmp_path)
    assert caught.value.where == str(tmp_path / name)
    assert "run again: nothing is lost" in caught.value.remedy
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.tmp"))
    assert (tmp_path / "run.json").read_text() == '{"step": 1}\n'
    assert not (tmp_path / "made").exists()


def _fail(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "rename":
        monkeypatch.setattr(os, "replace", full)
        return
    real = Path.open

    class Full:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._stream.close()

        write = writelines = full

    def opened(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "r" in mode:
            return real(path, mode, *arguments, **named)
        return full() if call == "open" else Full(real(path, mode, *arguments, **named))

    monkeypatch.setattr(Path, "open", opened)


def test_what_was_forbidden_is_a_fault_of_a_path_only_where_there_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explained(tmp_path):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # a signal to another user's process
    with pytest.raises(ConfigError, match="permission denied") as caught, explained(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl")
    assert caught.value.where == "/data/rows.jsonl"


def test_a_path_that_cannot_be_is_a_fault_of_the_call(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"the path is longer than the file system allows") as caught,
        explained(tmp_path),
    ):
        (tmp_path / ("x" * 300)).is_file()
    assert len(str(caught.value)) < 400
    with pytest.raises(FileNotFoundError), explained(tmp_path):  # what is not expected stays as it is
        (tmp_path / "nothing").read_text()


def test_leftovers_go_but_not_what_another_process_may_be_writing(tmp_path: Path) -> None:
    for name in (".run.json.0a.tmp", "kept.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, shared=True)
    assert len(list(tmp_path.iterdir())) == 3
    os.utime(tmp_path / ".run.json.0a.tmp", (1, 1))
    remove_leftovers(tmp_path, shared=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "kept.tmp"]


EMPTY = Manifest(stage="sft", kind="policy", fingerprint="5f0e9b1c" * 8, identity={})


def content(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model/weights").write_bytes(b"weights")
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("left", ["", MANIFEST, ".words.json.1234.tmp"])
def test_a_folder_without_a_file_is_not_published(tmp_path: Path, left: str) -> None:
    """``verify`` would reject the artifact in every later command."""
    (tmp_path / "work/empty").mkdir(parents=True)
    if left:
        (tmp_path / "work" / left).touch()
    with pytest.raises(StageError, match=r"wrote no file.*\n.*write at least one file into context\.content"):
        publish(tmp_path / "work", tmp_path / "made", EMPTY)
    assert not (tmp_path / "made").exists()


ODD: dict[str, Any] = {
    "identity": [],
    "inputs": {"init": 7},
    "base": "self",
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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lists no files"),
        ({"model/weights": {"size": 7}}, "content differs"),
        ({"model/weights": {"size": "7", "sha256": "x"}}, "cut short"),
        ({"../other": {"size": 1}}, "outside"),
        ({"/etc/passwd": {"size": 1}}, "outside"),
        ({"model\0": {"size": 1}}, "impossible"),
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


def test_an_interrupted_or_impossible_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "page.html") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(TypeError):
        write_json(tmp_path / "run.json", {"a": object()})
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "run.json", {"a": 1})
    assert (tmp_path / "run.json").read_text() == '{\n "a": 1\n}\n'
    assert not is_full(tmp_path / "not/made/yet", least=1)
    assert is_full(tmp_path, least=1 << 62)


def _publish_and_die(work: Path, target: Path, after_renames: int) -> None:
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
