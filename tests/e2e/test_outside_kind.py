"""A kind of stage from another package (tests/data/outside) is a stage like any other; nothing of ours names it."""

from __future__ import annotations

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from tests.documented.blocks import ROOT, blocks
from tests.e2e.forked import KILLED, Forked

OUTSIDE = Path(__file__).parents[1] / "data" / "outside"

README = ROOT / "alignment/stages/README.md"


RECIPE = """\
defaults: [base, adapter@stages.backwards.adapter: lora, _self_]
summary: a stage of somebody else's
stages:
  backwards:
    kind: toy
    data: {source: 'bundled:general/texts', limit: 8}
    optim: {batch_size: 2, max_steps: 6, micro_batch_tokens: 64}
  report: {kind: report, evaluation: null}
"""

SWEEP = """\
objective: {stage: backwards, metric: loss, minimize: true}
parameters: [{key: stages.backwards.optim.lr, values: [3e-3]}]
"""


class Outside:
    """The command in a folder with the recipe, and the other package installed."""

    def __init__(self, folder: Path, model: Path, forked: Forked) -> None:
        self.folder, self.model, self._forked = folder, model, forked
        for name, text in (("mine.yaml", RECIPE), ("rates.yaml", SWEEP)):
            (folder / name).write_text(text, encoding="utf-8")

    def __call__(self, *words: str, code: int = 0, installed: Path | None = OUTSIDE, **variables: str) -> str:
        own = [f"output={self.folder}", f"model.source=path:{self.model}", "model.dtype=float32", "launch.threads=1"]
        settings = {"stages": [], "status": ["--output", str(self.folder)]}.get(words[0], own)
        ended, printed = self._forked.run(
            [*words, *settings], installed=installed, folder=self.folder, variables=variables
        )
        assert ended == code, printed
        return printed

    def artifact(self) -> Path:
        record = json.loads((self.folder / "runs/mine/run.json").read_text())
        return Path(record["stages"]["backwards"]["artifact"])


@pytest.fixture(scope="module")
def outside(tiny_model_folder: Path, forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Outside:
    return Outside(tmp_path_factory.mktemp("outside"), tiny_model_folder, forked)


def test_it_is_planned_killed_resumed_reported_shown_and_swept(
    outside: Outside, tiny_model_folder: Path, forked: Forked, tmp_path: Path
) -> None:
    assert "toy          plain texts backwards (toy-stage)" in outside("stages")
    assert re.search(r"\bbackwards .*run ", outside("plan", "./mine.yaml"))
    outside("run", "./mine.yaml", code=5, **{KILLED: "backwards:2"})
    assert re.search(r"\bbackwards .*resume ", outside("plan", "./mine.yaml"))
    assert "toy loss" in outside("run", "./mine.yaml")
    artifact = outside.artifact()
    rows = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    identity = json.loads((artifact / "manifest.json").read_text())["identity"]
    assert (identity["kind"], identity["revision"]) == ("toy", 7)
    assert "Backward loss" in (outside.folder / "runs/mine/report.html").read_text()
    assert "toy loss" in outside("status", "mine")
    assert re.search(r"\bbackwards .*reuse ", outside("plan", "./mine.yaml"))

    undisturbed = Outside(tmp_path, tiny_model_folder, forked)
    undisturbed("run", "./mine.yaml")
    weights = "adapters/0-backwards/adapter_model.safetensors"
    assert (undisturbed.artifact() / weights).read_bytes() == (artifact / weights).read_bytes()
    assert "best: stages.backwards.optim.lr=" in outside("sweep", "./mine.yaml", "./rates.yaml")


def test_the_readme_shows_these_files_and_a_recipe_that_can_be_planned(outside: Outside) -> None:
    kind, run, project, recipe = blocks(README)
    assert kind.text == (OUTSIDE / "toy_stage/kind.py").read_text(encoding="utf-8")
    assert run.text == (OUTSIDE / "toy_stage/run.py").read_text(encoding="utf-8")
    info = OUTSIDE / "toy_stage-1.0.dist-info"
    shown = tomllib.loads(project.text)["project"]
    assert metadata.PathDistribution(info).metadata["Name"] == shown["name"]
    assert {point.name: point.value for point in metadata.PathDistribution(info).entry_points} == (
        shown["entry-points"]["alignment.stages"]
    )
    (outside.folder / "readme.yaml").write_text(recipe.text, encoding="utf-8")
    (outside.folder / "texts.jsonl").write_text('{"text": "The shop is closed on Monday."}\n', encoding="utf-8")
    assert re.search(r"\bbackwards .*run ", outside("plan", "./readme.yaml", "profile=smoke"))


def test_without_the_package_the_kind_is_unknown(outside: Outside) -> None:
    assert "stages.backwards.kind: 'toy'" in outside("plan", "./mine.yaml", code=2, installed=None)
