"""What ``align plan --cost``, ``--trade`` and ``align preview`` show, and refuse before they start anything."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.plan import show, show_cost, show_trades
from alignment.commands.preview.verb import show_preview
from alignment.core.errors import ConfigError, ModelError
from alignment.pipeline.execute import estimates
from alignment.records.cost import PhaseCost, RunCost, StageCost
from tests.hub import weights_file

GB = 10**9
TRAINING = {"weights": 2 * GB, "activations": 3 * GB}
LEARNS = StageCost(
    stage="dpo",
    kind="dpo",
    adapter="full",
    phases={
        "loading": PhaseCost(peak=GB, held=GB, parts={"weights": GB}),
        "training": PhaseCost(peak=5 * GB, held=6 * GB, parts=TRAINING, flop=2e13, seconds=61.0),
    },
    fixed=GB // 2,
    result=GB,
    checkpoints=9 * GB,
    steps=1200,
    tokens=3.4e6,
)
LATER = replace(LEARNS, stage="kto", checkpoints=3 * GB)


def printed(show: object, *arguments: object) -> list[str]:
    console = Console(file=io.StringIO(), width=160)
    show(console, *arguments)  # type: ignore[operator]
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def costs(*stages: StageCost, device: str = "this", memory: float = 64.0, startup: float = 5.0) -> RunCost:
    return RunCost(device=device, memory=memory * GB, startup=startup, stages=list(stages))


def test_a_cost_is_a_line_for_each_stage_and_what_they_need_together() -> None:
    lines = printed(partial(show_cost, free=11.0 * GB), costs(LEARNS, LATER))
    (line,) = [line for line in lines if line.startswith("dpo")]
    assert " ".join(line.split()[:13]) == "dpo full 6.50 GB 1.00 GB 1,200 3.4e+06 2.0e+13 1 min 01 s"
    assert "training: fixed 0.50, weights 2.00, activations 3.00, gaps 1.00" in line
    assert [line for line in lines if line.startswith(("time", "memory", "disk"))] == [
        "memory: each stage fits into 64.00 GB, with at least 57.50 GB to spare",
        "time: 2 min 02 s for all stages, and 5 s to import the libraries once",
        "disk: 11.00 GB for results and for the checkpoints of a stage while it trains",
    ]


LESS = replace(LEARNS, remedy=["optim.micro_batch_tokens=512", "adapter@a=lora"], remedy_peak=3 * GB)
ON_GPU = replace(LEARNS, host=16 * GB, first_rows=1000, assumed_tokens=2048)
FAILED = replace(LATER, error="it calls the server at http://x")


NOT_IN_4 = "dpo: 6.50 GB do not fit into 4.00 GB"
SMALL = ["memory: each"]
FIRST_ROWS = "dpo: FLOP and time cover only the first 1,000 rows"
WHOLE_DISK = "while it trains; only 10.00 GB are free; set output to a folder on a larger disk"
NO_LIBRARIES = "without importing libraries and without downloading, reading and storing files"


@pytest.mark.parametrize(
    ("cost", "options", "expected", "absent"),
    [
        (costs(LESS, memory=4), {}, [f"{NOT_IN_4}; 3.00 GB with optim.micro_batch_tokens=512 adapter@a=lora"], SMALL),
        (costs(LEARNS, memory=4), {}, [f"{NOT_IN_4}, even with the settings that were tried"], SMALL),
        (costs(LEARNS, memory=4), {"is_earlier": True}, [f"{NOT_IN_4}; --cost looks for settings that fit"], []),
        (costs(ON_GPU, device="h100", memory=80), {}, ["dpo: 16.00 GB of the host's memory", FIRST_ROWS], ["time:"]),
        (costs(ON_GPU), {}, ["dpo: micro_batch_tokens=auto counts as 2,048 tokens"], []),
        (costs(LEARNS, device="h100"), {}, [NO_LIBRARIES], []),
        (costs(LEARNS, startup=0.0), {}, ["time: 1 min 01 s for all stages\n"], []),
        (costs(LEARNS, memory=0), {}, [], SMALL),
        (costs(LEARNS, replace(LATER, fixed=9 * GB), memory=8), {}, ["kto: 15.00 GB do not fit into 8.00 GB"], SMALL),
        (costs(LEARNS, LATER), {"free": 10.0 * GB}, [WHOLE_DISK], []),
        (costs(LEARNS, FAILED), {}, ["kto: not estimated: it calls the server at"], ["time:", "memory:", "disk:"]),
    ],
)
def test_a_cost_says_what_does_not_fit_and_what_it_leaves_out(
    cost: RunCost, options: dict[str, Any], expected: list[str], absent: list[str]
) -> None:
    text = "\n".join([*printed(partial(show_cost, **options), cost), ""])
    assert [words for words in expected if words not in text] == []
    assert [words for words in absent if f"\n{words}" in text] == []


def test_a_trade_says_what_to_write() -> None:
    trade = replace(LEARNS, adapter="qlora", trained=5, weights=1000, remedy=["adapter@stages.dpo.adapter=qlora"])
    lines = printed(show_trades, "quickstart", RunCost(device="this", trades=[trade]))
    (line,) = [line for line in lines if line.startswith("dpo")]
    assert " ".join(line.split()) == "dpo qlora 6.50 1 min 01 s 0.50% adapter@stages.dpo.adapter=qlora"
    assert "align run quickstart" in "\n".join(lines)


def test_a_plan_shows_that_an_earlier_cost_sought_no_settings_for_the_memory_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(estimates, "known_costs", lambda _: costs(LEARNS, memory=4))
    lines = printed(show, "quickstart", [f"output={tmp_path}"])
    assert "dpo: 6.50 GB do not fit into 4.00 GB; --cost looks for settings that fit" in lines


@pytest.mark.parametrize(
    ("options", "gpu", "error", "words"),
    [
        ({"device": "h1000", "cost": True}, "", ConfigError, ("no device 'h1000'", "this, h200, h100")),
        ({"cost": True}, "", ModelError, ("bundled:smollm2-135m is not on this machine", "make model")),
        ({"cost": True}, "0", ConfigError, ("--cost", "--device h200")),
        ({"trade": True}, "0", ConfigError, ("--trade", "--device h200")),
    ],
)
def test_a_cost_that_cannot_be_estimated_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, gpu: str, error: Any, words: tuple[str, ...]
) -> None:
    """On a machine with a GPU, the GPU is to be named."""
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpu)
    with pytest.raises(error) as refused:
        show(Console(file=io.StringIO()), "quickstart", [f"output={tmp_path}"], **options)
    assert [word for word in words if word not in str(refused.value)] == []
    assert not (tmp_path / "artifacts").exists()


SFT = ", sft: {kind: sft, data: {source: 'bundled:quickstart/conversations'}}"


@pytest.mark.parametrize(
    ("stages", "stage", "message"),
    [
        ("", None, "stages: no stage of this recipe trains on rows"),
        ("", "report", "stages: no stage of this recipe trains on rows"),
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
    stages = f"{{report: {{kind: report, evaluation: null}}{stages}}}"
    recipe.write_text(f"defaults: [base, _self_]\nsummary: mine\nstages: {stages}\n")
    settings = [f"output={tmp_path}", f"model.source=path:{tmp_path / 'model'}"]
    with pytest.raises(ConfigError) as caught:
        show_preview(Console(), str(recipe), settings, stage=stage, rows=1, html=None)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", [".", "missing/page.html", "pipe"])
def test_a_page_that_cannot_be_a_file_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # like a device, it would be replaced; a failing test must not take the machine's
    with pytest.raises(ConfigError, match=r"--html: .* cannot be a file"):
        show_preview(Console(), "quickstart", [], stage=None, rows=1, html=str(tmp_path / name))
