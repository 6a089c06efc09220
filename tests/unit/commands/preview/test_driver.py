"""Which stages a preview shows, and what it says if there are none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from alignment.commands.preview.verb import show_preview
from alignment.core.errors import ConfigError
from tests.weights_files import weights_file

SFT = "sft: {kind: sft, data: {source: 'bundled:quickstart/conversations'}}"


@pytest.mark.parametrize(
    ("stages", "stage", "message"),
    [
        ("", None, "stages: no stage of this recipe trains on rows, so there is nothing to preview"),
        ("", "report", "stages: no stage of this recipe trains on rows, so there is nothing to preview"),
        (SFT, "report", "--stage: 'report' is not a training stage; one of: sft"),
    ],
)
def test_a_recipe_or_a_stage_without_rows_to_learn_from_is_refused(
    tmp_path: Path, stages: str, stage: str | None, message: str
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(weights_file())
    recipe = tmp_path / "mine.yaml"
    more = f", {stages}" if stages else ""
    recipe.write_text(
        f"defaults: [base, _self_]\nsummary: mine\nstages: {{report: {{kind: report, evaluation: null}}{more}}}\n"
    )
    settings = [f"output={tmp_path}", f"model.source=path:{tmp_path / 'model'}"]
    with pytest.raises(ConfigError) as caught:
        show_preview(Console(), str(recipe), settings, stage=stage, rows=1, html=None)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", [".", "missing/page.html", "pipe"])
def test_a_page_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # like a device, it would be replaced; a failing test must not take the machine's
    with pytest.raises(ConfigError, match=r"--html: .* cannot be a file"):
        show_preview(Console(), "quickstart", [], stage=None, rows=1, html=str(tmp_path / name))
