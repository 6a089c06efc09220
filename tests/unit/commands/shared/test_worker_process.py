"""A command whose worker is killed says so, and leaves nothing of what the worker wrote."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from alignment import cli
from alignment.commands.shared.worker_process import run_worker
from alignment.core.artifacts import Manifest, publish
from alignment.core.deadline import KILLED_BY
from alignment.core.errors import ModelError, StageError
from alignment.records.run import RunRecord
from tests.weights_files import weights_file

KILLED = """\
#!/bin/sh
mkdir .out.partial
echo weights > .out.partial/model.safetensors
kill -9 $$
"""
COMMANDS = {
    "export": ["sft", "--to", "out"],
    "add-tokens": ["path:base", "<|think|>", "--to", "out"],
    "chat": ["sft"],
    "track": ["mine", "--to", "tensorboard"],
}
WRITERS = ("export", "add-tokens")


def ends_by(number: int) -> list[str]:
    """The command line of a process that ends by a signal."""
    return [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base model, a policy, a run, and an interpreter that is killed."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "content", "runs/mine"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base/config.json").write_text("{}")
    (tmp_path / "base/model.safetensors").write_bytes(weights_file())
    (tmp_path / "content/metrics.jsonl").touch()
    base = {"source": "path:base", "path": str(tmp_path / "base"), "content": None}
    identity = {"kind": "sft", "base": {"dtype": "float32"}}
    manifest = Manifest(stage="sft", kind="policy", fingerprint="0" * 64, identity=identity, base=base)
    publish(tmp_path / "content", tmp_path / "sft", manifest)
    RunRecord(name="mine").write(tmp_path / "runs/mine")
    python = tmp_path / "python"
    python.write_text(KILLED)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return tmp_path


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_whose_process_is_killed_says_so(folder: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert cli.main([verb, *COMMANDS[verb]]) == 5
    assert capsys.readouterr().err == (
        f"error: {verb}: its process was ended by signal 9\n"
        "  → run it again; signal 9 often means that the machine ran out of memory\n"
    )
    assert not (folder / "out").exists()
    assert (folder / ".out.partial").exists() == (verb not in WRITERS), "it removes what its own worker wrote"


def test_a_template_that_never_ends_is_named() -> None:
    with pytest.raises(ModelError, match="preview: the chat template ran for more than 30 s in one step"):
        run_worker(ends_by(KILLED_BY), verb="preview")


def test_other_exit_codes_are_the_worker_s() -> None:
    assert run_worker([sys.executable, "-c", "import sys; sys.exit(4)"], verb="chat") == 4
    with pytest.raises(StageError, match=f"chat: its process was ended by signal {int(signal.SIGTERM)}"):
        run_worker(ends_by(signal.SIGTERM), verb="chat")
