"""A model is found again in the folder where it was, as long as its content is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.pipeline.sources.model_sources import resolve, unchanged
from tests.weights_files import weights_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / COMMIT
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(weights_file())
    return made


def test_a_folder_counts_by_its_content(folder: Path) -> None:
    identity = resolve(f"path:{folder}", where="base").identity
    assert unchanged("path:relative", folder, identity=identity) == folder
    (folder / "model.safetensors").write_bytes(weights_file(b"others"))
    assert unchanged("path:relative", folder, identity=identity) is None
    assert unchanged("path:relative", folder / "gone", identity=identity) is None


def test_a_snapshot_of_a_hub_counts_by_its_commit(folder: Path) -> None:
    """Also if the branch of the source has moved on since."""
    assert unchanged("hub:org/name", folder, identity=f"hub:org/name@{COMMIT}") == folder
    assert unchanged("hub:org/name", folder, identity="hub:org/name@another") is None
    (folder / "model.safetensors").unlink()
    assert unchanged("hub:org/name", folder, identity=f"hub:org/name@{COMMIT}") is None


def test_a_folder_that_cannot_be_read_is_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the home of another user, who made a run that is shared."""

    def refuse(_: str, *, where: str) -> Path:
        raise PermissionError(13, "Permission denied", where)

    monkeypatch.setattr("alignment.pipeline.sources.model_sources.model_folder", refuse)
    assert unchanged("hub:org/name", folder, identity=f"hub:org/name@{COMMIT}") is None


def test_the_cache_has_bundled_models(folder: Path) -> None:
    assert unchanged("bundled:smollm2-135m", folder, identity="gguf-sha256:0") is None
