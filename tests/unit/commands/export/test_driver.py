"""What ``align export`` refuses before it loads anything; that it writes is shown end to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.export.export_options import ExportOptions, add_form_arguments, options_of
from alignment.commands.export.verb import export
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, ModelError
from tests.weights_files import weights_file


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    """Publishes a result with nothing in it but a file."""

    def make(**changes: Any) -> Path:
        (tmp_path / "content").mkdir()
        (tmp_path / "content/metrics.jsonl").touch()
        fields = {"stage": "sft", "kind": "policy", "fingerprint": "0" * 64, "identity": {}}
        publish(tmp_path / "content", tmp_path / "sft", Manifest(**{**fields, **changes}))
        return tmp_path / "sft"

    return make


def _refused(result: object, tmp_path: Path, *, to: str | None = None) -> AlignmentError:
    with pytest.raises(AlignmentError) as caught:
        export(
            Console(), str(result), to=to or str(tmp_path / "out"), options=ExportOptions(), output=tmp_path / "none"
        )
    return caught.value


def test_what_is_no_result_is_named(tmp_path: Path) -> None:
    assert "there is no run 'quickstart'" in str(_refused("quickstart/dpo", tmp_path))
    (tmp_path / "empty").mkdir()
    assert isinstance(_refused(tmp_path / "empty", tmp_path), ArtifactError)


def test_an_evaluation_is_no_model(tmp_path: Path, artifact: Callable[..., Path]) -> None:
    fault = _refused(artifact(kind="evaluation"), tmp_path)
    assert isinstance(fault, ConfigError)
    assert "of kind evaluation" in str(fault)


def test_a_folder_that_exists_is_not_written_over(tmp_path: Path, artifact: Callable[..., Path]) -> None:
    folder = artifact(base={"source": "self"})
    assert "exists already" in str(_refused(folder, tmp_path, to=str(tmp_path)))
    assert "does not exist" in str(_refused(folder, tmp_path, to=str(tmp_path / "no" / "out")))


def test_a_base_that_is_gone_or_another_one_is_refused(tmp_path: Path, artifact: Callable[..., Path]) -> None:
    gone = {"source": "path:gone", "path": str(tmp_path / "gone"), "content": None}
    assert isinstance(_refused(artifact(base=gone), tmp_path), ModelError)


def test_a_base_of_another_content_is_refused(tmp_path: Path, artifact: Callable[..., Path]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(weights_file())
    folder = artifact(base={"source": f"path:{base}", "path": str(base), "content": "files-sha256:other"})
    assert "its content has changed" in str(_refused(folder, tmp_path))


# ---- the interpreter that reads a GGUF file -------------------------------------------------------------------------


def _argv(options: ExportOptions, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The worker's command line."""
    commands: list[list[str]] = []
    monkeypatch.setattr("alignment.pipeline.backends.processes.call", lambda argv: commands.append(argv) or 1)
    assert export(Console(), str(artifact), to=str(tmp_path / "out"), options=options, output=tmp_path) == 1
    return commands[0]


def test_an_interpreter_that_is_not_there_is_refused(
    tmp_path: Path, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact(base={"source": "self"})
    options = ExportOptions(form="gguf", llama_python=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"--llama-python: .*is not a program that can be run\n.*make engine-llama"):
        export(Console(), str(folder), to=str(tmp_path / "out"), options=options, output=tmp_path)
    monkeypatch.setenv("ALIGNMENT_LLAMA_CPP_PYTHON", str(tmp_path))
    with pytest.raises(ConfigError, match=r"ALIGNMENT_LLAMA_CPP_PYTHON: .*is not a program"):
        export(Console(), str(folder), to=str(tmp_path / "out"), options=ExportOptions(form="gguf"), output=tmp_path)


def test_the_interpreter_is_the_one_named_or_the_one_that_was_built(
    tmp_path: Path, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact(base={"source": "self"})
    monkeypatch.delenv("ALIGNMENT_LLAMA_CPP_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf = ExportOptions(form="gguf")
    assert "--llama-python" not in _argv(gguf, folder, tmp_path, monkeypatch)
    built = tmp_path / "cache" / "alignment" / "engines" / "llama-cpp" / "bin" / "python"
    built.parent.mkdir(parents=True)
    built.symlink_to(sys.executable)  # as in an environment, whose interpreter must not be followed to its origin
    assert _argv(gguf, folder, tmp_path, monkeypatch)[-2:] == ["--llama-python", str(built)]
    monkeypatch.setenv("ALIGNMENT_LLAMA_CPP_PYTHON", sys.executable)
    assert _argv(gguf, folder, tmp_path, monkeypatch)[-2:] == ["--llama-python", sys.executable]
    assert "--llama-python" not in _argv(ExportOptions(), folder, tmp_path, monkeypatch)


def test_options_arrive_at_the_worker(
    tmp_path: Path, artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact(base={"source": "self"})
    options = ExportOptions(form="gguf", max_gap=0.5, dtype="bf16", llama_python=sys.executable, has_modelfile=False)
    argv = _argv(options, folder, tmp_path, monkeypatch)
    parser = argparse.ArgumentParser()
    add_form_arguments(parser)
    assert options_of(parser.parse_args(argv[argv.index("--as") :])) == options


@pytest.mark.parametrize(
    ("more", "name"),
    [(["--dtype", "f16"], "--dtype"), (["--llama-python", "x"], "--llama-python"), (["--no-modelfile"], "--no-mod")],
)
@pytest.mark.parametrize("form", ["model", "adapter"])
def test_an_option_of_gguf_files_is_refused_beside_another_form(form: str, more: list[str], name: str) -> None:
    parser = argparse.ArgumentParser()
    add_form_arguments(parser)
    with pytest.raises(ConfigError, match=rf"{name}.*: is an option of --as gguf\n"):
        options_of(parser.parse_args(["--as", form, *more]))
