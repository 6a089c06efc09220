"""PPO scored by the user's own function and watched by a held-out scorer: what the command says, leaves and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.core.artifacts import verify
from tests.e2e.conftest import Align
from tests.e2e.forked import Forked

ALONE = ("~stages.reward", "~stages.dpo", "~stages.evaluate", "~stages.report", "stages.ppo.reward=null")


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _ppo(align: Align, run: str) -> Path:
    stages = json.loads((align.output / f"runs/{run}/run.json").read_text())["stages"]
    return Path(stages["ppo"]["artifact"])


def test_a_function_scores_a_rule_joins_it_and_a_guard_watches(finished: Align, forked: Forked, tmp_path: Path) -> None:
    align = replace(finished, forked=forked)
    file = tmp_path / "score.py"
    file.write_text(
        "def brevity(prompts, completions, rows):\n    return [-float(len(text)) for text in completions]\n"
    )
    scorers = f"{{source: '{file}:brevity', weight: 0.1}}, {{source: length, target: 4, normalize: true}}"
    overrides = (
        "name=scored",
        *ALONE,
        f"stages.ppo.scorers=[{scorers}]",
        "stages.ppo.guard={every: 2, prompts: 2, scorer: {source: length, target: 2}}",
        "stages.ppo.ptx={coefficient: 0.1, batch_size: 2, "
        "data: {source: 'bundled:quickstart/conversations', limit: 4}}",
        "stages.ppo.critic_warmup=1",
    )
    assert f"runs your code: {file}:brevity" in align("plan", *overrides)
    align("run", *overrides)
    folder = _ppo(align, "scored")
    manifest = verify(folder, content=True)
    lines = _lines(folder / "metrics.jsonl")
    assert {"score/brevity", "score/length", "objective/score"} <= set(lines[0])
    assert ["loss/ptx" in line for line in lines] == [False, True, True], "PTX waits for the policy to learn"
    assert ["guard/scorer" in line for line in lines] == [True, False, True]
    looks = _lines(folder / "guard.jsonl")
    assert [look["step"] for look in looks] == [0, 2, 3]
    best = looks[-1]["guard/best_update"]
    assert manifest.metrics["guard/kept_update"] == best
    assert len(_lines(folder / "samples.jsonl")) == 12  # four of each update
    assert (folder / "critic.safetensors").is_file() == (best == 3), "it belongs to the last policy"
    assert manifest.metrics["memory/base_copies"] < 1.1


def test_a_function_that_gives_nan_is_named_with_its_row_and_nothing_is_made(
    finished: Align, forked: Forked, tmp_path: Path
) -> None:
    align = replace(finished, forked=forked)
    file = tmp_path / "score.py"
    file.write_text("def broken(prompts, completions, rows):\n    return [0.5] * (len(rows) - 1) + [float('nan')]\n")
    printed = align("run", "name=broken", *ALONE, f"stages.ppo.scorers=[{{source: '{file}:broken'}}]", code=9)
    assert f"{file}:broken" in printed
    assert "nan" in printed
    assert "preferences.jsonl:" in printed, "the row is named"
    assert not _ppo(align, "broken").exists()
