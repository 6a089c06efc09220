"""What the documentation says of a run that exists, and what it quotes of one, on the run of this folder's tests."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.documented.blocks import ROOT, Block, all_blocks, blocks
from tests.documented.commands import commands, same_output
from tests.e2e.conftest import Align
from tests.e2e.forked import Forked

ON_A_RUN = [block for block in all_blocks() if "run" in block.needs and "person" not in block.needs]
VERBS = ("status", "compare", "chat", "export", "add-tokens")
"""What is executed; the tests of the blocks themselves plan ``run`` and ``sweep``."""
NAMES = ("quickstart", "draft", "first", "second")
"""Runs that the pages name."""


@pytest.fixture
def runs(finished: Align, tmp_path: Path) -> Path:
    """A folder with the finished run under each of the names; the stage ``draft`` is its policy by DPO."""
    record = json.loads((finished.output / "runs/quickstart/run.json").read_text(encoding="utf-8"))
    record["stages"]["draft"] = record["stages"]["dpo"]
    for name in NAMES:
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(record | {"name": name}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("block", ON_A_RUN, ids=lambda block: block.id)
def test_a_command_on_a_run_ends_well(block: Block, runs: Path, finished: Align, forked: Forked) -> None:
    called = [command.words[1:] for command in commands(block) if command.words[1] in VERBS]
    assert called, "no command that a run or a model is needed for"
    for words in called:
        here = [re.sub(r"^\./|^(?=[\w-]+\.html$)", f"{runs}/", word) for word in words]
        here = [word.replace("bundled:smollm2-135m", f"path:{finished.model}") for word in here]
        more = [] if words[0] == "add-tokens" else ["--output", str(runs)]
        more += ["--max-gap", "10"] if "gguf" in words else []  # a tiny random model is nearly sure of nothing
        code, printed = forked.run([*here, *more])
        if code == 2 and "vllm" in words and "make engine" in printed:
            continue  # the page says that it needs that environment; tests/engines has it
        assert code == 0, printed


def test_a_run_leaves_the_folders_that_the_page_names(finished: Align) -> None:
    (shown,) = [block.text for block in blocks(ROOT / "docs/running.md") if block.text.startswith("artifacts/")]
    assert [line.split()[0] for line in shown.splitlines()] == ["artifacts/<stage>-<8", "runs/<run>/"]
    run = finished.output / "runs/quickstart"
    named = re.findall(r"[\w]+\.(?:json|yaml|txt|html)", shown)
    assert named == ["run.json", "stage.yaml", "log.txt", "report.html"]
    for stage in set(finished.stages()) - {"report"}:
        assert re.fullmatch(rf"{stage}-[0-9a-f]{{8}}", finished.artifact(stage).name)
        missing = [name for name in named if not (run / name).is_file() and not (run / stage / name).is_file()]
        assert missing == []
    assert not (run / "report").exists()


def test_a_scorer_that_gives_nan_ends_with_the_error_that_the_page_quotes(finished: Align, tmp_path: Path) -> None:
    """docs/rewards.md, with results of the finished run, in a folder of its own."""
    (quoted,) = [block.text for block in blocks(ROOT / "docs/rewards.md") if "gave nan" in block.text]
    (tmp_path / "artifacts").mkdir()
    for artifact in (finished.output / "artifacts").iterdir():
        (tmp_path / "artifacts" / artifact.name).symlink_to(artifact)
    score = tmp_path / "score.py"
    score.write_text("def brevity(prompts, completions, rows):\n    return [float('nan')] * len(rows)\n")
    scorers = f"stages.ppo.scorers=[{{source: '{score}:brevity'}}]"
    align = replace(finished, output=tmp_path)
    printed = align("run", "stages.ppo.reward=null", scorers, "--stage", "ppo", code=9)
    error = printed[printed.index("scorer: ") :]
    assert same_output(quoted, error, differs=True), error
    assert "preferences.jsonl:" in error, "the row is named"
    assert not Path(align.stages()["ppo"]["artifact"]).exists()
