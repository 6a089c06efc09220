"""For a plan of costs a configuration is enough, and a run still sees that the weights are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.core.errors import ModelError
from alignment.pipeline.sources import hub
from alignment.pipeline.sources.model_sources import resolve, resolve_shapes


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return tmp_path


def test_a_folder_without_weights_will_do_for_shapes_alone(shapes: Path) -> None:
    model = resolve_shapes(f"path:{shapes}", where="model.source")
    assert model.ready
    assert model.folder == shapes
    with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
        resolve(f"path:{shapes}", where="model.source")


def test_a_folder_without_a_configuration_will_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_shapes(f"path:{tmp_path}", where="model.source")


def test_of_a_hubs_model_no_weights_are_downloaded_and_a_run_does_that_later(
    shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], bool]] = []

    def snapshot(repository: object, *, patterns: list[str], download: bool, failure: object) -> Path | None:
        asked.append((patterns, download))
        return shapes if any(download for _, download in asked) else None

    monkeypatch.setattr(hub, "snapshot", snapshot)
    model = resolve_shapes("hub:org/name@main", where="model.source")
    assert (model.ready, model.folder) == (True, shapes)
    patterns, download = asked[-1]
    assert download
    assert sorted(patterns) == ["*.jinja", "*.json", "*.model", "*.txt", "adapter_model.safetensors"]
    assert not resolve("hub:org/name@main", where="model.source").ready
    assert sorted(asked[-1][0]) == ["*.jinja", "*.json", "*.model", "*.safetensors", "*.txt"]
