"""``align plan --cost``: before anything is trained, and beside what was measured afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from tests.e2e.conftest import Align


def test_a_plan_says_what_its_stages_would_need_and_the_next_one_remembers(new_align: Callable[[], Align]) -> None:
    align = replace(new_align(), recipe="sft_dpo")
    printed = align("plan", "--cost")
    lines = {line.split()[0]: line for line in printed.splitlines() if " GB " in line and "stages." not in line}
    assert set(lines) >= {"sft", "dpo", "evaluate"}
    assert "cannot be estimated" not in printed
    assert not (align.output / "runs").exists()
    assert [path.name for path in (align.output / "artifacts").iterdir()] == [".cost"]
    again = align("plan")
    assert lines["dpo"] in again
    kept = {path.suffix for path in (align.output / "artifacts" / ".cost").iterdir()}
    assert kept == {".json"}


def test_the_cost_on_a_gpu_needs_none_and_an_unknown_one_is_refused(new_align: Callable[[], Align]) -> None:
    align = replace(new_align(), recipe="sft_dpo")
    refused = align("plan", "--device", "h1000", code=2)
    assert "no device 'h1000'" in refused
    assert "one of this, h200, h100" in refused
    shapes = align.output / "shapes"
    shapes.mkdir(parents=True)
    for path in align.model.iterdir():
        if path.suffix != ".safetensors":
            (shapes / path.name).write_bytes(path.read_bytes())
    printed = align("plan", f"model.source=path:{shapes}", "--device", "a100-40")
    assert "cannot be estimated" not in printed
    [file, *_] = (align.output / "artifacts" / ".cost").glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["device"] == "a100-40"
