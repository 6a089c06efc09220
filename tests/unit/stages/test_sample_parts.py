"""A stage that samples answers in parts: interruptions, damage, and what a part may not depend on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignment import worker
from alignment.core.errors import ModelError
from alignment.stages.sample import answer_scoring
from alignment.stages.shared import answer_sampling
from alignment.training.context import StageContext
from tests.sampled import asked, sample_spec


def run(spec: Any) -> dict[str, bytes]:
    """The files that the stage makes."""
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return {name: (spec.artifact / name).read_bytes() for name in ("rows.jsonl", "samples.jsonl", "sampling.json")}


@pytest.mark.parametrize(("function", "calls"), [("generate", 2), ("score", 1)])
def test_a_stage_that_is_stopped_in_the_middle_makes_the_same_bytes_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, calls: int
) -> None:
    straight = run(sample_spec(tmp_path / "straight"))
    spec = sample_spec(tmp_path / "stopped")
    parts = {"generate": 3, "score": 3}
    made = _stopping(monkeypatch, function, after=calls)
    with pytest.raises(KeyboardInterrupt):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    monkeypatch.undo()
    made = _stopping(monkeypatch, function, after=99)
    assert run(spec) == straight
    assert len(made) == parts[function] - calls


def _stopping(monkeypatch: pytest.MonkeyPatch, function: str, *, after: int) -> list[int]:
    """Parts that were made from now on, by ``generate`` or by ``score``; the stage stops after so many."""
    made: list[int] = []
    module, name = (answer_sampling, "generate") if function == "generate" else (answer_scoring, "build_rewards")
    right = getattr(module, name)

    def counted(call: Any) -> Any:
        def once(*args: Any, **kwargs: Any) -> Any:
            if len(made) == after:
                raise KeyboardInterrupt
            made.append(1)
            return call(*args, **kwargs)

        return once

    def building(*args: Any) -> Any:
        rewards = right(*args)
        monkeypatch.setattr(rewards, "scores", counted(rewards.scores))
        return rewards

    monkeypatch.setattr(module, name, counted(right) if function == "generate" else building)
    return made


@pytest.mark.parametrize(
    "damage", ["{", '{"value": [[1]], "sha256": "0"}', "null", pytest.param("[" * 100_000, id="deep")]
)
def test_a_damaged_part_is_made_again_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    straight = run(sample_spec(tmp_path / "straight"))
    spec = sample_spec(tmp_path / "stopped")
    _stopping(monkeypatch, "generate", after=2)
    with pytest.raises(KeyboardInterrupt):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    monkeypatch.undo()
    first, second = sorted((spec.work / "checkpoints").glob("part-*.json"))
    first.write_text(damage)
    made = _stopping(monkeypatch, "generate", after=99)
    assert run(spec) == straight
    assert len(made) == 2
    assert [record.args[0] for record in caplog.records if "made again" in record.message] == [first]
    assert second.name != first.name


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_any_is_sampled(tmp_path: Path) -> None:
    """The policy has 4096 positions, and the last prompt is the longest."""
    longest = asked(2)
    longest["messages"][0]["content"] *= 300
    prompts = [asked(0), asked(1), longest]
    spec = sample_spec(tmp_path, prompts=prompts, batch_size=4, max_prompt_length=99999)
    with pytest.raises(ModelError, match="4096 positions"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert not list((spec.work / "checkpoints").glob("part-*"))


def test_answers_do_not_depend_on_what_is_sampled_beside_them(tmp_path: Path) -> None:
    straight = run(sample_spec(tmp_path / "one", batch_size=12))
    assert run(sample_spec(tmp_path / "other", batch_size=5)) == straight
    another_seed = run(sample_spec(tmp_path / "seed", seed=1))
    assert another_seed["samples.jsonl"] != straight["samples.jsonl"]


def test_parts_of_another_size_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(sample_spec(tmp_path / "straight"))
    spec = sample_spec(tmp_path / "stopped", batch_size=12)
    _stopping(monkeypatch, "generate", after=2)
    with pytest.raises(KeyboardInterrupt):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    monkeypatch.undo()
    assert run(sample_spec(tmp_path / "stopped", batch_size=8)) == straight


@pytest.mark.parametrize(("prompts", "size", "parts"), [(1, 2, 1), (31, 2, 16), (32, 4, 8), (64, 8, 8), (500, 8, 63)])
def test_a_part_has_several_batches_if_enough_parts_remain_to_share(prompts: int, size: int, parts: int) -> None:
    """Four answers to each prompt, eight a batch."""
    config: Any = SimpleNamespace(batch_size=8, completions_per_prompt=4)
    asked_prompts: Any = SimpleNamespace(rows=list(range(prompts)))
    spans = answer_sampling.spans_of(config, asked_prompts)
    assert len(spans) == parts
    assert [span.stop - span.start for span in spans[:-1]] == [size] * (parts - 1)
    assert [row for span in spans for row in span] == list(range(prompts))
