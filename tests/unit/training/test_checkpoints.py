"""Only checkpoints that are whole and belong to the stage are continued; the others are set aside."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.training.checkpoints import MANIFEST, newest, rotate, seal, step_of

OWN, FOREIGN = "a" * 64, "b" * 64


def _checkpoint(folder: Path, step: int, *, sealed: bool = True, fingerprint: str = OWN) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "optimizer").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(200)))
    (checkpoint / "optimizer" / "rank0.pt").write_text(f"step {step}")
    if sealed:
        seal(checkpoint, fingerprint=fingerprint)
    return checkpoint


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_sealed_checkpoint_is_taken_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        _checkpoint(tmp_path, step)
    checkpoint = newest(tmp_path, fingerprint=OWN)
    assert checkpoint == tmp_path / "checkpoint-10"
    assert step_of(checkpoint) == 10


@pytest.mark.parametrize("exists", [True, False])
def test_without_checkpoints_there_is_none(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "checkpoints"
    if exists:
        (folder / "runs").mkdir(parents=True)
        (folder / "checkpoint-best").mkdir()
    assert newest(folder, fingerprint=OWN) is None


def _flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def _list(checkpoint: Path, files: Any) -> None:
    """A manifest of this stage's with another list."""
    (checkpoint / MANIFEST).write_text(json.dumps({"fingerprint": OWN, "files": files}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a file cut short": lambda c: (c / "model.safetensors").write_bytes(b"short"),
    "a file that is empty": lambda c: (c / "optimizer" / "rank0.pt").write_text(""),
    "a flipped bit": _flip_a_bit,
    "a missing file": lambda c: (c / "optimizer" / "rank0.pt").unlink(),
    "a manifest cut short": lambda c: (c / MANIFEST).write_text((c / MANIFEST).read_text()[:-30]),
    "a manifest of zeros": lambda c: (c / MANIFEST).write_bytes(b"\0" * 80),
    "a manifest that is not UTF-8": lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe"),
    "a manifest with other content": lambda c: (c / MANIFEST).write_text("{}"),
    "a manifest that is a list": lambda c: (c / MANIFEST).write_text("[1, 2]"),
    "a manifest that lists nothing": lambda c: _list(c, {}),
    "a manifest with a list of files": lambda c: _list(c, ["model.safetensors"]),
    "a manifest without sizes": lambda c: _list(c, {"model.safetensors": {}}),
    "a manifest of a file that cannot be": lambda c: _list(c, {"a\0": {"size": 1}}),
    "a manifest of a file outside": lambda c: _list(c, {"/etc/passwd": {"size": Path("/etc/passwd").stat().st_size}}),
    "another stage's": lambda c: seal(c, fingerprint=FOREIGN),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken(tmp_path: Path, damage: str) -> None:
    older = _checkpoint(tmp_path, 4)
    DAMAGES[damage](_checkpoint(tmp_path, 8))
    assert newest(tmp_path, fingerprint=OWN) == older
    assert _names(tmp_path) == ["checkpoint-4", "quarantine-checkpoint-8"]


def test_a_checkpoint_that_was_set_aside_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _flip_a_bit(_checkpoint(tmp_path, 8))
    newest(tmp_path, fingerprint=OWN)
    (line,) = caplog.messages
    assert line == "checkpoint-8 is damaged or of another stage; it was set aside as quarantine-checkpoint-8"


def test_a_checkpoint_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object, **__: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    _checkpoint(tmp_path, 8)
    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        newest(tmp_path, fingerprint=OWN)
    assert _names(tmp_path) == ["checkpoint-8"]


def test_when_all_are_damaged_training_starts_afresh_and_nothing_is_lost(tmp_path: Path) -> None:
    for step in (4, 8):
        _flip_a_bit(_checkpoint(tmp_path, step))
    assert newest(tmp_path, fingerprint=OWN) is None
    assert _names(tmp_path) == ["quarantine-checkpoint-4", "quarantine-checkpoint-8"]


def test_a_checkpoint_that_was_never_finished_is_removed(tmp_path: Path) -> None:
    older = _checkpoint(tmp_path, 4)
    _checkpoint(tmp_path, 8, sealed=False)
    assert newest(tmp_path, fingerprint=OWN) == older
    assert _names(tmp_path) == ["checkpoint-4"]


def test_a_step_can_be_set_aside_twice(tmp_path: Path) -> None:
    for _ in range(2):
        _flip_a_bit(_checkpoint(tmp_path, 8))
        assert newest(tmp_path, fingerprint=OWN) is None
    assert _names(tmp_path) == ["quarantine-checkpoint-8"]


def test_a_damaged_checkpoint_older_than_a_good_one_is_not_touched(tmp_path: Path) -> None:
    _flip_a_bit(_checkpoint(tmp_path, 4))
    _checkpoint(tmp_path, 8)
    assert newest(tmp_path, fingerprint=OWN) == tmp_path / "checkpoint-8"
    assert _names(tmp_path) == ["checkpoint-4", "checkpoint-8"]


def test_a_seal_lists_every_file_but_itself(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path, 4)
    listed = json.loads((checkpoint / MANIFEST).read_text())
    assert listed["fingerprint"] == OWN
    assert sorted(listed["files"]) == ["model.safetensors", "optimizer/rank0.pt"]


def test_a_checkpoint_sealed_twice_still_verifies(tmp_path: Path) -> None:
    """The trainer may save the same step again: at a signal and at the end."""
    checkpoint = _checkpoint(tmp_path, 4)
    (checkpoint / "model.safetensors").write_bytes(b"written again")
    seal(checkpoint, fingerprint=OWN)
    assert newest(tmp_path, fingerprint=OWN) == checkpoint


def test_rotation_keeps_the_two_newest(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6):
        _checkpoint(tmp_path, step)
    rotate(tmp_path)
    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-6"]


def test_rotation_never_counts_what_is_not_sealed(tmp_path: Path) -> None:
    """A half-written newest checkpoint must not push out the last good ones."""
    for step in (2, 4):
        _checkpoint(tmp_path, step)
    _checkpoint(tmp_path, 6, sealed=False)
    rotate(tmp_path)
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
