"""What a worker looks at before it begins."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from alignment import worker
from alignment.config.model import ModelConfig
from alignment.config.stage import SftConfig
from alignment.data.chat_template import template_text
from alignment.errors import DataError
from alignment.fingerprint import content_sha256, digest
from alignment.training.context import StageContext
from alignment.worker import _refuse_changed_data
from tests.tiny import tiny_spec


def test_data_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    spec = tiny_spec(tmp_path, SftConfig(), identity={"data": content_sha256(file)})
    _refuse_changed_data(spec)
    file.write_text("{} ")
    with pytest.raises(DataError, match=r"data\.jsonl: changed since the run was planned"):
        _refuse_changed_data(spec)


def test_a_full_disk_is_told_as_such_and_makes_room_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(tmp_path, SftConfig())

    def run(_: object, context: StageContext) -> None:
        (context.checkpoints / "checkpoint-4").mkdir(parents=True)
        (spec.work / worker.RESERVE).write_bytes(b"0")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(worker, "read_spec", lambda path: spec)
    monkeypatch.setattr(worker, "_run", run)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    assert worker.main(tmp_path / "stage.yaml") == 5
    status = json.loads((spec.run_folder / "status.json").read_text())
    assert status["exit_code"] == 5
    assert "no space left on the device; " in status["error"]
    assert "free space and run again: nothing is lost" in status["error"]
    assert not list((spec.work / "checkpoints").iterdir()), "half a checkpoint only takes room"
    assert not (spec.work / worker.RESERVE).exists()


def test_progress_that_cannot_be_written_ends_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = StageContext(spec=tiny_spec(tmp_path, SftConfig()), rank=0, world_size=1)
    monkeypatch.setattr("os.replace", _full)
    context.progress("training", 1, 2)
    assert not list(context.spec.work.rglob("*.tmp"))


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("can't allocate memory: 9 GB"),
    ],
)
def test_running_out_of_memory_comes_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    spec = tiny_spec(tmp_path, SftConfig())

    def run(_: object, context: StageContext) -> None:
        context.progress("training")
        raise error

    monkeypatch.setattr(worker, "read_spec", lambda path: spec)
    monkeypatch.setattr(worker, "_run", run)
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    assert worker.main(tmp_path / "stage.yaml") == 5
    status = json.loads((spec.run_folder / "status.json").read_text())
    assert status["exit_code"] == 5
    assert "out of memory while training" in status["error"]
    assert "micro_batch_tokens" in status["error"]


def test_a_template_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    source = f"path:{file}"
    identity = {"base": {"chat_template": digest(template_text(source))}}
    model = ModelConfig(source="path:tiny", chat_template=source)
    spec = tiny_spec(tmp_path, SftConfig(), identity=identity, model=model)
    _refuse_changed_data(spec)
    file.write_text("{{ tools }}")
    with pytest.raises(DataError, match=r"model\.chat_template: changed since the run was planned"):
        _refuse_changed_data(spec)
