"""The tables of ``align plan --cost`` and ``--trade``."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import partial

from rich.console import Console

from alignment.commands.plan import show_cost, show_trades
from alignment.records.cost import PhaseCost, RunCost, StageCost

GB = 10**9
LEARNS = StageCost(
    stage="dpo",
    kind="dpo",
    adapter="full",
    phases={
        "loading": PhaseCost(peak=GB, held=GB, parts={"weights": GB}),
        "training": PhaseCost(
            peak=5 * GB, held=6 * GB, parts={"weights": 2 * GB, "activations": 3 * GB}, flop=2e13, seconds=61.0
        ),
    },
    fixed=GB // 2,
    result=GB,
    checkpoints=9 * GB,
    steps=1200,
    tokens=3.4e6,
)


def printed(show: object, *arguments: object) -> str:
    console = Console(file=io.StringIO(), width=160)
    show(console, *arguments)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_line_says_memory_time_work_and_what_holds_the_memory() -> None:
    text = printed(show_cost, RunCost(device="this", memory=64.0 * GB, stages=[LEARNS]))
    line = next(line for line in text.splitlines() if line.startswith("dpo"))
    assert line.split()[:13] == [
        "dpo",
        "full",
        "6.50",
        "GB",
        "1.00",
        "GB",
        "1,200",
        "3.4e+06",
        "2.0e+13",
        "1",
        "min",
        "01",
        "s",
    ]
    assert "training: fixed 0.50, weights 2.00, activations 3.00, gaps 1.00" in line
    assert "do not fit" not in text


def test_what_does_not_fit_is_said_with_what_would() -> None:
    stage = replace(
        LEARNS,
        remedy=["stages.dpo.optim.micro_batch_tokens=512", "adapter@stages.dpo.adapter=lora"],
        remedy_peak=3 * GB,
    )
    text = printed(show_cost, RunCost(device="this", memory=4.0 * GB, stages=[stage]))
    assert (
        "dpo: 6.50 GB do not fit into 4.00 GB; "
        "3.00 GB with stages.dpo.optim.micro_batch_tokens=512 adapter@stages.dpo.adapter=lora"
    ) in text
    alone = printed(show_cost, RunCost(device="this", memory=4.0 * GB, stages=[LEARNS]))
    assert "dpo: 6.50 GB do not fit into 4.00 GB, even with the settings that were tried" in alone
    earlier = printed(partial(show_cost, is_earlier=True), RunCost(device="this", memory=4.0 * GB, stages=[LEARNS]))
    assert "dpo: 6.50 GB do not fit into 4.00 GB; --cost looks for settings that fit" in earlier


def test_on_a_gpu_the_host_needs_memory_too_and_uncounted_rows_are_named() -> None:
    stage = replace(LEARNS, host=16 * GB, first_rows=1000, assumed_tokens=2048)
    text = printed(show_cost, RunCost(device="h100", memory=80.0 * GB, stages=[stage]))
    assert "dpo: 16.00 GB of the host's memory" in text
    assert "dpo: FLOP and time cover only the first 1,000 rows" in text
    assert "dpo: micro_batch_tokens=auto counts as 2,048 tokens" in text


def test_results_stay_on_the_disk_and_checkpoints_of_one_stage_at_a_time() -> None:
    cost = RunCost(device="this", stages=[LEARNS, replace(LEARNS, stage="kto", checkpoints=3 * GB)])
    expected = "disk: 11.00 GB for results and for the checkpoints of a stage while it trains"
    assert f"{expected}\n" in printed(show_cost, cost)
    assert f"{expected}\n" in printed(partial(show_cost, free=11.0 * GB), cost)
    assert f"{expected}; only 10.00 GB are free; set output to a folder on a larger disk" in printed(
        partial(show_cost, free=10.0 * GB), cost
    )


def test_a_stage_that_cannot_be_estimated_says_why() -> None:
    stage = StageCost(stage="ppo", kind="ppo", adapter="lora", error="it calls the server at http://x")
    text = printed(show_cost, RunCost(device="this", memory=64.0 * GB, stages=[LEARNS, stage]))
    assert "ppo: not estimated: it calls the server at http://x" in text
    assert not any(line.startswith(("time:", "memory:", "disk:")) for line in text.splitlines()), "no sum without it"


def test_a_trade_says_what_to_write() -> None:
    trade = replace(
        LEARNS,
        adapter="qlora",
        trained=5,
        weights=1000,
        remedy=["adapter@stages.dpo.adapter=qlora"],
    )
    text = printed(show_trades, "quickstart", RunCost(device="this", trades=[trade]))
    line = next(line for line in text.splitlines() if line.startswith("dpo"))
    assert line.split() == ["dpo", "qlora", "6.50", "1", "min", "01", "s", "0.50%", "adapter@stages.dpo.adapter=qlora"]
    assert "align run quickstart" in text


def test_the_time_of_all_stages_has_the_imports_apart() -> None:
    stages = [LEARNS, replace(LEARNS, stage="kto")]
    cost = RunCost(device="this", startup=5.0, stages=stages)
    assert "\ntime: 2 min 02 s for all stages, and 5 s to import the libraries once\n" in printed(show_cost, cost)
    assert "\ntime: 2 min 02 s for all stages\n" in printed(show_cost, replace(cost, startup=0.0))


def test_a_time_that_leaves_something_out_is_not_shown() -> None:
    for part in (replace(LEARNS, first_rows=1000), replace(LEARNS, error="it fails")):
        assert "\ntime:" not in printed(show_cost, RunCost(device="this", stages=[LEARNS, part]))


def test_a_gpus_time_says_what_it_leaves_out() -> None:
    expected = "without importing libraries and without downloading, reading and storing files"
    assert expected in printed(show_cost, RunCost(device="h100", startup=5.0, stages=[LEARNS]))


def test_stages_that_fit_are_said_to_and_how_much_is_left() -> None:
    cost = RunCost(device="4090", memory=24.0 * GB, stages=[LEARNS, replace(LEARNS, stage="kto")])
    assert "\nmemory: each stage fits into 24.00 GB, with at least 17.50 GB to spare\n" in printed(show_cost, cost)
    assert "each stage fits" not in printed(show_cost, replace(cost, memory=6.0 * GB))
    assert "each stage fits" not in printed(show_cost, replace(cost, memory=0.0))
