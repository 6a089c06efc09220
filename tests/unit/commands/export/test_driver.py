"""What ``align export`` refuses before it loads anything; that it writes is shown end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.export.driver import export
from alignment.commands.export.export_options import ExportOptions
from alignment.core.artifacts import Manifest, publish
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, ModelError


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Path]:
    """Publishes a result with nothing in it."""

    def make(**changes: Any) -> Path:
        (tmp_path / "content").mkdir()
        told = {"stage": "sft", "kind": "policy", "fingerprint": "0" * 64, "identity": {}}
        publish(tmp_path / "content", tmp_path / "sft", Manifest(**{**told, **changes}))
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
    found = _refused(artifact(kind="evaluation"), tmp_path)
    assert isinstance(found, ConfigError)
    assert "of kind evaluation" in str(found)


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
    (base / "model.safetensors").write_bytes(b"weights")
    folder = artifact(base={"source": f"path:{base}", "path": str(base), "content": "files-sha256:other"})
    assert "its content has changed" in str(_refused(folder, tmp_path))
