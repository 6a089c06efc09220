"""A policy that forgot ends the run with an exit code of its own, once the report is made, and each time anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from safetensors.torch import load_file, save_file

from alignment.core.artifacts import verify
from alignment.pipeline.sweeps.objectives import of_stage
from alignment.stages.forgetting.kind import ForgettingConfig
from tests.e2e.conftest import Align
from tests.tiny import save_tiny_model


@dataclass(frozen=True, kw_only=True)
class Gated:
    """The recipe ``replay``, its gate before SFT's policy and ``ruined``; ``printed`` by its first run."""

    align: Align
    ruined: str
    overrides: tuple[str, ...]
    printed: str

    def __call__(self, *more: str, code: int = 0) -> str:
        """The run with more overrides."""
        return self.align("run", *self.overrides, *more, code=code)


@pytest.fixture(scope="module")
def gated(new_forked: Callable[[], Align], tmp_path_factory: pytest.TempPathFactory) -> Gated:
    """A run that ended at its gate. A random base has nothing that SFT could spoil, so one arm is sure of nonsense."""
    align = replace(new_forked(), recipe="replay")
    folder = save_tiny_model(tmp_path_factory.mktemp("policy") / "ruined")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ruined = f"path:{folder}"
    overrides = (
        "stages.sft.data.mix=[]",
        "stages.forgetting.data.limit=6",
        "stages.forgetting.bootstrap_samples=100",
        f"stages.forgetting.arms=['stage:sft','{ruined}']",
    )
    return Gated(align=align, ruined=ruined, overrides=overrides, printed=align("run", *overrides, code=10))


def test_the_rest_of_the_run_is_made_and_says_what_was_forgotten(gated: Gated) -> None:
    assert {stage["state"] for stage in gated.align.stages().values()} == {"done"}
    run = gated.align.output / "runs/replay"
    assert json.loads((run / "run.json").read_text())["state"] == "gate not met"
    page = (run / "report.html").read_text()
    assert "What was forgotten" in page
    assert " forgot too much: perplexity of general text is " in page
    assert "forgetting: sft passed: perplexity of general text " in gated.printed
    assert "gate: stages.forgetting: ruined forgot too much: perplexity of general text is " in gated.printed
    assert "was trained elsewhere" in gated.printed


def test_the_artifact_has_every_figure(gated: Gated) -> None:
    folder = gated.align.artifact("forgetting")
    manifest = verify(folder, content=True)
    record = json.loads((folder / "forgetting.json").read_text())
    assert (manifest.kind, manifest.metrics["passed"], record["passed"]) == ("forgetting", 0.0, False)
    assert [(arm["name"], arm["passed"]) for arm in record["arms"]] == [
        ("base", True),
        ("stage:sft", True),
        (gated.ruined, False),
    ]
    assert manifest.metrics["perplexity/sft"] == record["arms"][1]["perplexity"]
    config = ForgettingConfig(arms=["stage:sft", gated.ruined])
    assert [name for name in manifest.metrics if name not in of_stage(config)] == [], "a sweep may ask for it"
    texts, questions = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("texts.jsonl", "questions.jsonl")
    )
    assert (len(texts), len(questions)) == (record["num_texts"], record["num_questions"]) == (6, 110)
    base = sum(text["nats"]["base"] for text in texts) / sum(text["tokens"] for text in texts)
    assert base == pytest.approx(record["arms"][0]["nats"])
    right = [question["right"]["stage:sft"] for question in questions]
    assert sum(right) / len(right) == pytest.approx(record["arms"][1]["ability"])


def test_a_reused_result_trips_again_and_so_does_the_stage_alone(gated: Gated) -> None:
    assert "gate: stages.forgetting: ruined" in gated(code=10)
    assert {stage["state"] for stage in gated.align.stages().values()} == {"reused"}
    gated("--stage", "forgetting", code=10)
    gated("--stage", "report")


def test_a_job_of_a_chain_ends_well_so_that_the_next_one_starts(gated: Gated) -> None:
    gated("--stage", "forgetting", "launch/backend=slurm", "launch.backend.submit=false")


def test_within_wider_limits_the_same_policies_pass(gated: Gated) -> None:
    wide = ("stages.forgetting.max_perplexity_rise=1e9", "stages.forgetting.max_ability_drop=1.0")
    assert "forgetting: ruined passed: " in gated(*wide, "~stages.evaluate", "~stages.report")
    assert gated.align.stages()["sft"]["state"] == "reused"
