"""``align plan --cost``: before anything is trained, and beside what was measured afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.e2e.conftest import Align


def test_a_plan_says_what_its_stages_would_need_and_the_next_one_remembers(new_align: Callable[[], Align]) -> None:
    align = replace(new_align(), recipe="sft_dpo")
    fewer = [
        f"stages.{stage}.{setting}"
        for stage in ("sft", "dpo")
        for setting in ("data.limit=2", "optim.batch_size=1", "optim.micro_batch_tokens=2048")
    ]
    trained = ("~stages.evaluate", "~stages.report", *fewer)  # each length of a row has operations to time
    printed = align("plan", "--cost", *trained)
    lines = {line.split()[0]: line for line in printed.splitlines() if " GB " in line and "stages." not in line}
    assert set(lines) >= {"sft", "dpo"}
    assert "estimating sft (1 of 2)\nestimating dpo (2 of 2; about " in printed, "it says how far it is"
    assert "not estimated" not in printed
    assert not (align.output / "runs").exists()
    assert [path.name for path in (align.output / "artifacts").iterdir()] == [".cost"]
    again = align("plan", *trained)
    assert lines["dpo"] in again
    (time,) = [line for line in printed.splitlines() if line.startswith("time: ")]
    assert time in again
    suffixes = {path.suffix for path in (align.output / "artifacts" / ".cost").iterdir()}
    assert suffixes == {".json"}
