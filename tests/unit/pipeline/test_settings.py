"""Settings that only together cannot be right are refused before anything starts, and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.core.errors import ConfigError
from tests.unit.pipeline.conftest import MakePlan

DPO = "stages.dpo.adapter"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapter@stages.sft.adapter=full", f"{DPO}.chain=continue"], f"{DPO}.chain: stage:sft has no adapter"),
        (["stages.dpo.init=base", f"{DPO}.chain=continue"], f"{DPO}.chain: base has no adapter to continue"),
        ([f"{DPO}.chain=continue", f"{DPO}.rank=8"], f"{DPO}.rank: 8 cannot continue an adapter with 16"),
        ([f"{DPO}.chain=continue", f"{DPO}.kind=dora"], f"{DPO}.kind: dora cannot continue what stage:sft trained"),
        ([f"{DPO}.chain=stack", f"{DPO}.kind=dora"], f"{DPO}.chain: DoRA rescales the weights"),
        ([f"{DPO}.chain=stack", f"{DPO}.modules_to_save=[embed_tokens]"], f"{DPO}.chain: modules_to_save needs"),
        (
            ["stages.sft.adapter.modules_to_save=[embed_tokens]", f"{DPO}.chain=stack"],
            f"{DPO}.chain: stage:sft trains modules_to_save, which can only be merged",
        ),
        (
            ["adapter@stages.sft.adapter=dora", f"{DPO}.kind=qlora", f"{DPO}.chain=stack"],
            f"{DPO}.chain: stage:sft trained DoRA, which needs weights that are not in four bits; use chain 'merge'",
        ),
        (
            [
                "adapter@stages.sft.adapter=dora",
                f"{DPO}.chain=stack",
                "stages.ppo.init=stage:dpo",
                "stages.ppo.adapter={kind: qlora, chain: stack}",
            ],
            "stages.ppo.adapter.chain: stage:sft trained DoRA",
        ),
        (
            ["adapter@stages.sft.adapter=qlora", f"{DPO}.chain=stack"],
            f"{DPO}.chain: stage:sft trained on weights in four bits, which only qlora keeps; use qlora, or",
        ),
        (["stages.reward.adapter={kind: prefix, chain: stack}"], "stages.reward.adapter.chain: a prefix cannot"),
        (["adapter@stages.sft.adapter=prefix"], "stages.reward.adapter: stage:sft trained a prefix"),
    ],
)
def test_adapters_that_cannot_stand_on_one_another_are_refused(plan: MakePlan, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*settings)
    assert words in str(caught.value)


def test_moments_in_eight_bits_need_modules_in_float32(plan: MakePlan) -> None:
    settings = (f"{DPO}.modules_to_save=[embed_tokens]", "stages.dpo.optim.moments=eight_bit")
    words = r"stages\.dpo\.optim\.moments: 'eight_bit' needs float32 weights, but adapter\.modules_to_save are"
    with pytest.raises(ConfigError, match=words):
        plan(*settings)
    plan(*settings, "model.dtype=float32")


def test_adapters_that_can_are_not(plan: MakePlan) -> None:
    plan(f"{DPO}.chain=continue", "stages.reward.adapter.chain=stack", "stages.ppo.adapter={kind: qlora, chain: stack}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["launch.backend.signal_seconds=120"],
            "launch.backend.signal_seconds: a job is asked to save 120 seconds before its end",
        ),
        (["launch.backend.time=0:05:00"], "launch.backend.time: '0:05:00' is not longer than signal_seconds"),
        (
            ["launch.backend.gpus=1", "launch.num_processes=2"],
            "launch.backend.gpus: 1 for 2 processes; use one for each: 2",
        ),
        (["launch.num_processes=0"], "launch.backend.gpus: 0, and launch.num_processes is 0"),
    ],
)
def test_a_job_that_would_fail_after_it_has_waited_is_refused(plan: MakePlan, settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan("launch/backend=slurm", *settings)
    plan("launch/backend=slurm", *settings, "launch.backend.submit=false")  # as in the job, whose limits count no more


def test_a_day_of_a_job_has_24_hours(plan: MakePlan) -> None:
    plan("launch/backend=slurm", "launch.backend.time=1-00:00:00")


def test_a_column_that_no_format_has_is_named_with_the_nearest(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("stages.sft.data.columns={promt: x}", "stages.dpo.data.columns={zzz: x}")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1] == "stages.sft.data.columns.promt: no format has a column of this name; did you mean 'prompt'?"
    assert lines[2].startswith("stages.dpo.data.columns.zzz: no format has a column of this name; one of: answer, ")
    (tmp_path / "score.py").write_text("def of(prompts, completions, rows): ...")
    rows = tmp_path / "preferences.jsonl"
    rows.write_text(rows.read_text().replace('{"messages"', '{"hard": 1, "messages"'))
    plan(
        f"stages.ppo.scorers=[{{source: reward}}, {{source: '{tmp_path}/score.py:of'}}]",
        "stages.ppo.data.columns={level: hard}",
    )
