"""A hash of a large file is remembered, and never for another content."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from alignment.pipeline.sources import model_sources
from alignment.pipeline.sources.model_sources import remembered_sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are kept of files of eight bytes, which were touched long ago."""
    monkeypatch.setattr(model_sources, "_LARGE", 8)
    monkeypatch.setattr(model_sources, "_SETTLED_NS", -1)
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/sha256"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read: list[Path] = []
    real = model_sources.file_sha256
    monkeypatch.setattr(model_sources, "file_sha256", lambda path: (read.append(path), real(path))[1])
    return read


def test_a_large_file_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _count_reads(monkeypatch)
    (tmp_path / "a").write_bytes(b"01234567")
    assert [remembered_sha256(tmp_path / "a") for _ in range(3)] == [_sha(b"01234567")] * 3
    assert len(read) == len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_another_content_of_the_same_size_and_time_is_another_hash(how: str, tmp_path: Path, cache: Path) -> None:
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"01234567")
    before = file.stat()
    assert remembered_sha256(file) == _sha(b"01234567")
    if how == "replaced":
        other.write_bytes(b"abcdefgh")
        os.replace(other, file)
    else:
        with file.open("r+b") as stream:
            stream.write(b"abcdefgh")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert remembered_sha256(file) == _sha(b"abcdefgh")


def test_a_file_that_was_touched_just_now_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within a tick of the kernel's clock would look like none."""
    monkeypatch.setattr(model_sources, "_SETTLED_NS", 3_600 * 10**9)
    (tmp_path / "a").write_bytes(b"01234567")
    assert remembered_sha256(tmp_path / "a") == _sha(b"01234567")
    assert not cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"01234567")

    def read_and_write(path: Path) -> str:
        path.write_bytes(b"01234567abc")
        return _sha(b"01234567")

    monkeypatch.setattr(model_sources, "file_sha256", read_and_write)
    remembered_sha256(file)
    assert not cache.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"sha256": 7}', '{"sha256": "short"}', "\udcff", pytest.param("[" * 100_000, id="deep")],
)
def test_a_damaged_memory_is_read_anew(text: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a").write_bytes(b"01234567")
    sha = remembered_sha256(tmp_path / "a")
    (memo,) = cache.iterdir()
    memo.write_bytes(text.encode(errors="surrogateescape"))
    assert remembered_sha256(tmp_path / "a") == sha
    assert json.loads(memo.read_text())["sha256"] == sha


def test_where_the_cache_cannot_be_written_a_file_is_read_every_time(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = _count_reads(monkeypatch)
    cache.parent.write_text("a file, where a folder would have to be made")
    (tmp_path / "a").write_bytes(b"01234567")
    assert [remembered_sha256(tmp_path / "a") for _ in range(2)] == [_sha(b"01234567")] * 2
    assert len(read) == 2
