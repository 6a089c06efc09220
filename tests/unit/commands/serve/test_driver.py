"""What ``align serve`` refuses before it starts a server, and what it prints."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.serve import verb, worker
from alignment.commands.serve.verb import Options, serve
from alignment.commands.serve.worker_error import write_error, written_error
from alignment.core import hardware
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, DataError, DiskError, ModelError
from alignment.records.run import RunRecord, StageEntry
from tests.served import ServedRun, served_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ServedRun:
    run = served_run(tmp_path_factory.mktemp("driver"))
    young = run.output / "runs" / "young"
    young.mkdir()
    RunRecord(name="young", stages={"sft": StageEntry(kind="sft", state="planned", artifact="/nowhere")}).write(young)
    return run


def refused(run: ServedRun, result: str = "mine", *arms: str, **options: Any) -> AlignmentError:
    """The error of a command that starts nothing."""
    with pytest.raises(AlignmentError) as caught:
        serve(Console(), result, arms, options=Options(**{"port": 0, **options}), output=run.output)
    return caught.value


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start() -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(verb, "Keeper", start)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("mine", "dpp"), 2, "run 'mine' has no stage 'dpp'; did you mean 'dpo'?"),
        (("other",), 2, "there is no run 'other'"),
        (("mine", "sft", "sft"), 2, "2 arms are called sft"),
        (("young",), 7, "no stage of this run has produced a policy yet"),
        (("young", "sft"), 7, "no complete artifact here"),
    ],
)
def test_arms_that_cannot_be_served_are_named(run: ServedRun, words: tuple[str, ...], code: int, message: str) -> None:
    error = refused(run, *words)
    assert message in error.message
    assert error.exit_code == code


@pytest.mark.parametrize("option", ["engine_python", "api_key_env", "tool_parser"])
def test_options_of_vllm_are_refused_for_transformers(run: ServedRun, option: str) -> None:
    error = refused(run, **{option: "x"})
    assert (error.where, error.exit_code) == (f"--{option.replace('_', '-')}", 2)
    assert error.message == "only vLLM has this option"


def test_a_key_that_is_not_set_is_named_with_what_to_do(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    error = refused(run, engine="vllm", api_key_env="MY_KEY")
    assert error.message == "the environment variable MY_KEY is not set"
    assert error.remedy == "export MY_KEY=…, or leave the option out for a server without a key"


def test_missing_libraries_are_named_with_what_installs_them(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "starlette" else find(name))
    error = refused(run)
    assert (error.where, error.remedy) == ("align serve", "pip install 'starlette>=1,<2'")


def test_a_missing_environment_of_vllm_is_named(run: ServedRun, tmp_path: Path) -> None:
    error = refused(run, engine="vllm", engine_python=str(tmp_path / "python"))
    assert (error.where, error.exit_code) == ("--engine-python", 2)
    assert "is not an interpreter that can be run" in error.message


@pytest.mark.parametrize("gpus", [0, 1])
def test_vllm_without_a_gpu_is_advised_against(run: ServedRun, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(verb, "interpreter", lambda *_, **__: Path("python"))
    monkeypatch.setattr(hardware, "count_devices", lambda: gpus)
    console = Console(record=True, file=io.StringIO())
    with pytest.raises(AssertionError, match="a process was started"):
        serve(console, "mine", ["dpo"], options=Options(engine="vllm", port=0), output=run.output)
    assert ("default engine" in console.export_text()) is (gpus == 0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_refused(run: ServedRun, port: int) -> None:
    assert refused(run, port=port).message == f"{port} is not a port"


def test_a_key_that_is_not_set_is_refused_before_anything_starts(
    run: ServedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVE_KEY", "")
    error = refused(run, engine="vllm", api_key_env="SERVE_KEY")
    assert (error.where, error.exit_code) == ("--api-key-env", 2)
    assert "the environment variable SERVE_KEY is not set" in error.message


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "mine", "--engine", "ollama"])
    assert "invalid choice: 'ollama'" in capsys.readouterr().err


def test_the_printed_command_is_quoted_for_a_shell() -> None:
    assert verb._curl("http://127.0.0.1:8000", "it's/dpo", "KEY") == (
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
        '-H "Authorization: Bearer $KEY" -d \'{"model": "it\'"\'"\'s/dpo", '
        '"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}\''
    )


def test_a_disk_without_room_for_what_vllm_loads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "merged"))

    monkeypatch.setattr("alignment.commands.serve.vllm_files.write_files", full)
    settings = tmp_path / "serve.json"
    settings.write_text(json.dumps({"policies": [], "engine": "vllm"}))
    assert worker.main([str(settings), "0"]) == DiskError.exit_code
    error = written_error(tmp_path)
    assert isinstance(error, DiskError)
    assert error.where == str(tmp_path / "merged")


@pytest.mark.parametrize("kind", [ConfigError, DataError, ModelError, DiskError, ArtifactError])
def test_an_error_of_the_worker_reaches_the_driver_as_it_is(tmp_path: Path, kind: type[AlignmentError]) -> None:
    assert written_error(tmp_path) is None
    write_error(tmp_path, kind("it is damaged", where="there", remedy="mend it"))
    error = written_error(tmp_path)
    assert type(error) is kind
    assert error is not None
    assert (error.message, error.where, error.remedy) == ("it is damaged", "there", "mend it")
