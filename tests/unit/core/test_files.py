"""A file is written whole or not at all, and a disk that takes no more is named as such."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from alignment.core.artifacts import Manifest, publish, write_json, write_lines
from alignment.core.errors import ConfigError, DiskError
from alignment.core.files import disk_error, explained, is_full, parse_json, remove_leftovers, replacing
from alignment.records.step_log import MetricsLog
from alignment.report.kit.pages import write_page

ROOT = Path(__file__).parents[3]


def _publish(folder: Path) -> None:
    content = folder / "content"
    content.mkdir(exist_ok=True)
    (content / "weights").touch()
    publish(content, folder / "made", Manifest(stage="sft", kind="policy", fingerprint="5f" * 32, identity={}))


def _keep_through(folder: Path) -> None:
    MetricsLog(folder / "metrics.jsonl").keep_through(1)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "run.json": ("run.json", lambda folder: write_json(folder / "run.json", {"state": "failed"})),
    "rows": ("samples.jsonl", lambda folder: write_lines(folder / "samples.jsonl", [{"step": 2}])),
    "page": ("report.html", lambda folder: write_page("<p>", folder / "report.html")),
    "manifest": ("content/manifest.json", _publish),
    "metrics": ("metrics.jsonl", _keep_through),
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
        """A file that opens and takes nothing."""

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


def test_a_metric_that_cannot_be_appended_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, {"loss": 0.5})
    _fail(monkeypatch, "write")
    with pytest.raises(DiskError) as caught, explained(tmp_path):
        log.append(2, {"loss": 0.4})
    assert caught.value.where == str(tmp_path / "metrics.jsonl")
    monkeypatch.undo()
    assert log.rows() == [{"step": 1, "loss": 0.5}]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on the device; "),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up; "),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (OSError(errno.EFBIG, "File too large"), "larger than the limit on file sizes"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left on the device; "),
        (Exception("No space left on device (os error 28)"), "no space left on the device; "),
        (OSError("git: write error: No space left on device"), "no space left on the device; "),
        (RuntimeError("unable to write to file </torch_7>: No space left on device (28)"), "no space left"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "no space left"),
    ],
)
def test_every_way_in_which_a_library_reports_a_full_disk_is_understood(
    tmp_path: Path, error: Exception, words: str
) -> None:
    fault = disk_error(error, folder=tmp_path)
    assert fault is not None
    assert words in fault.message
    assert (fault.exit_code, fault.where) == (12, str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("upload refused: File too large"),
        RuntimeError("upload refused: File too large"),
        KeyError("unexpected position of a token"),
        RuntimeError("unexpected pos of an answer"),
        TypeError("no space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:110] . file in archive is not in a subdirectory"),
    ],
)
def test_words_of_somebody_else_s_error_are_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    assert disk_error(error, folder=tmp_path) is None


def test_what_was_forbidden_is_a_fault_of_a_path_only_where_there_is_a_path(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), explained(tmp_path):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # a signal to another user's process
    with pytest.raises(ConfigError, match="permission denied") as caught, explained(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl")
    assert caught.value.where == "/data/rows.jsonl"


def test_the_disk_is_seen_behind_the_error_that_it_led_to(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/weights")
        except OSError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        fault = disk_error(error, folder=tmp_path)
    assert fault is not None
    assert fault.where == "/data/weights"
    assert disk_error(ValueError("no disk is full here"), folder=tmp_path) is None
    assert disk_error(OSError(errno.ENOENT, "No such file", "x"), folder=tmp_path) is None


def test_a_limit_on_file_sizes_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """The real thing, in a process of its own: ``ulimit -f``."""
    code = (
        "import sys, pathlib, resource\n"
        "from alignment.core.files import explained, write_text\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with explained(folder):\n    write_text(folder / 'run.json', 'x' * 9000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    expected = f"DiskError: {tmp_path}/run.json: the file would be larger than the limit on file sizes allows, 4.1 kB"
    assert expected in done.stderr
    assert "ulimit -f unlimited" in done.stderr
    assert not list(tmp_path.iterdir())


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


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with replacing(tmp_path / "page.html") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_room_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    assert not is_full(tmp_path / "not/made/yet", least=1)
    assert is_full(tmp_path, least=1 << 62)


@pytest.mark.parametrize("text", ["[" * 100_000, b'{"a": ' * 100_000, "{"], ids=["lists", "objects", "half"])
def test_text_that_is_not_json_or_nested_too_deeply_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting|deeply"):
        parse_json(text)
