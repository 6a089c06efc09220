"""Before the first stage it is tried whether the base model fits the later ones: its positions and its architecture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.core.errors import DataError, ModelError
from alignment.pipeline.plan.plan import Plan
from tests.unit.pipeline.conftest import NUM_PAIRS, MakePlan, leave_artifact
from tests.unit.pipeline.test_rehearsal import Commands, stages_in, started, tried

__all__ = ["started", "tried"]
CHECKED = "checked before any training: "
LONG = "z" * 2100
"""Not shorter in tokens."""


def write_config(folder: Path, **settings: object) -> None:
    (folder / "model/config.json").write_text(json.dumps(settings))


def write_rows(file: Path, *questions: str, answer: str = "") -> None:
    answers = [{"role": "assistant", "content": answer}] if answer else []
    rows = [{"messages": [{"role": "user", "content": question}, *answers]} for question in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_held_out_prompts_that_are_too_long_are_refused_with_the_longest(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, max_position_embeddings=2048)
    write_rows(tmp_path / "heldout.jsonl", "When?", f"When {LONG}?", f"When, when {LONG}?", "Where?")
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[]")
    assert str(caught.value).startswith(f"stage evaluate, {CHECKED}{tmp_path}/heldout.jsonl:3: ")
    assert "needs more than the 2048 positions of path:" in str(caught.value)
    assert "; 2 of 4 rows are too long\n" in str(caught.value)
    assert "leave out rows that are too long, or lower stages.evaluate.max_new_tokens" in str(caught.value)
    write_config(tmp_path, max_position_embeddings=4096)
    tried("stages.evaluate.metrics=[]")
    with pytest.raises(ModelError, match="an answer of up to 2000 tokens"):
        tried("stages.evaluate.metrics=[]", "stages.evaluate.max_new_tokens=2000")


def test_rows_that_a_stage_allows_but_the_model_cannot_read_are_refused(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    """A later stage would otherwise find out after earlier ones have trained."""
    write_config(tmp_path, max_position_embeddings=2048)
    row = {"messages": [{"role": "user", "content": "When?"}], "chosen": LONG, "rejected": "Soon."}
    with (tmp_path / "preferences.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")
    tried("stages.evaluate.metrics=[]")
    with pytest.raises(ModelError) as caught:
        tried("stages.evaluate.metrics=[]", "stages.dpo.max_length=4096")
    assert str(caught.value).startswith(f"stage dpo, {CHECKED}{tmp_path}/preferences.jsonl:{NUM_PAIRS + 1}: a row of ")
    assert " is longer than the model's 2048 positions" in str(caught.value)
    tried(
        "stages.evaluate.metrics=[]", "stages.dpo.max_length=4096", "stages.dpo.data.fraction=0.9"
    )  # it may be left out
    with pytest.raises(ModelError, match=r"stage ppo, .*preferences.jsonl:1: a row of \d+ tokens is longer"):
        tried("stages.evaluate.metrics=[]", "stages.ppo.max_new_tokens=2040")


def test_held_out_prompts_are_tried_with_their_tools(tried: Callable[..., Plan], tmp_path: Path) -> None:
    """They count as tokens, and a template that leaves them out would end the evaluation."""
    write_config(tmp_path, max_position_embeddings=2048)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    row = {"messages": [{"role": "user", "content": "2 + 2?"}], "tools": [tool]}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="the chat template leaves out"):
        tried("stages.evaluate.metrics=[]")


def test_held_out_prompts_are_refused_that_are_longer_than_before_longrope_changes_its_frequencies(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    factors = {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 2048, **factors}
    write_config(tmp_path, model_type="llama", max_position_embeddings=131072, rope_parameters=rope)
    write_rows(tmp_path / "heldout.jsonl", f"When {LONG}?")
    with pytest.raises(ModelError, match=r"2048 positions of path:\S+ before LongRoPE changes its frequencies; 1 of 1"):
        tried("stages.evaluate.metrics=[]")


def test_the_examples_before_a_prompt_count(tried: Callable[..., Plan], tmp_path: Path) -> None:
    write_config(tmp_path, max_position_embeddings=2048)
    write_rows(tmp_path / "examples.jsonl", "Why?", answer=LONG)
    tried("stages.evaluate.arms=[base, 'stage:sft']", "stages.evaluate.metrics=[]")
    with pytest.raises(ModelError, match=r"the arm 'base\+few-shot' needs more than the 2048 positions") as caught:
        tried(
            "stages.evaluate.arms=[base, base+few-shot, 'stage:sft']",
            "stages.evaluate.metrics=[]",
            "stages.evaluate.few_shot.count=1",
            f"stages.evaluate.few_shot.data.source=path:{tmp_path}/examples.jsonl",
        )
    assert "or lower stages.evaluate.max_new_tokens or stages.evaluate.few_shot.count" in str(caught.value)


def test_a_base_without_scores_is_refused_where_a_reward_model_is_trained(
    tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe")
    with pytest.raises(ModelError, match=rf"^stage reward, {CHECKED}path:.* no model with a score .* 'olmoe'"):
        tried()


def test_a_base_without_scores_is_refused_only_with_a_critic_of_its_own(
    plan: MakePlan, tried: Callable[..., Plan], tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe")
    for stage in plan().stages[:2]:
        leave_artifact(stage)
    tried("stages.ppo.critic=shared")
    with pytest.raises(ModelError, match=rf"^stage ppo, {CHECKED}path:.*\n.* PPO has critic=shared or none"):
        tried("stages.ppo.critic=separate")


def test_policies_that_began_as_another_model_are_not_measured_by_the_base(
    tried: Callable[..., Plan], started: Commands, tmp_path: Path
) -> None:
    write_config(tmp_path, model_type="olmoe", max_position_embeddings=4)
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    tried(f"stages.sft.init=path:{tmp_path}/other")
    assert [stages_in(command) for command in started] == [["--rows", "--scorers", "ppo", "evaluate", "--model"]]
