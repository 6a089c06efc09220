"""Validation on several processes decides as on one, and a stage that is killed hands on the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.launch import Sharding
from alignment.config.model import AdapterConfig
from alignment.job import StageSpec
from tests.chained import FULL, LORA, Chained
from tests.distributed.processes import on_processes
from tests.distributed.test_sharding import logs, needs_deepspeed, weights
from tests.noisy import HELD_OUT, by_hand, held_out_losses, held_out_rows, lines, manifest, overfitting, ran
from tests.oracles.close import close

NONE, ZERO3, FSDP = Sharding.none, Sharding.zero3, Sharding.fsdp


def steadied(spec: StageSpec, **changes: Any) -> StageSpec:
    """With an optimiser that does not blow a gradient up that is nothing but rounding."""
    config: Any = spec.config
    return replace(spec, config=replace(config, optim=replace(config.optim, adam_eps=1e-2, **changes)))


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding", "rate"),
    [("sft", LORA, NONE, 0.1), ("sft", FULL, ZERO3, 3e-2), ("reward", FULL, FSDP, 3e-2)],
    ids=lambda value: getattr(getattr(value, "kind", value), "value", value),
)
def test_two_processes_hand_on_what_one_hands_on(
    tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding, rate: float
) -> None:
    """Five held-out rows, of which neither process can have half, and micro-batches that hold some of them."""
    specs = []
    for together in (False, True):
        chained, validation = Chained(tmp_path / str(together)), replace(HELD_OUT, patience=1)
        spec = overfitting(chained, kind, adapter, validation, max_steps=30, rate=rate)
        spec = steadied(spec, micro_batch_tokens=150)
        if together:
            spec = replace(spec, sharding=sharding)
            assert on_processes(spec) == [0, 0], logs(spec)
        else:
            ran(spec)
        specs.append(spec)
    alone, both = specs
    looks = held_out_losses(lines(alone))
    assert held_out_losses(lines(both)) == pytest.approx(looks, rel=1e-4)
    assert manifest(both) == pytest.approx(manifest(alone), rel=1e-3, abs=1e-4)
    assert manifest(both)["validation/step"] < manifest(both)["validation/last_step"], "an earlier step is handed on"
    ours, others = weights(both.artifact), weights(alone.artifact)
    assert ours.keys() == others.keys()
    for name, held in ours.items():
        close(held, others[name], atol=1e-5)


def test_at_the_end_of_the_training_rows_every_held_out_pair_counts(tmp_path: Path) -> None:
    """The last batch of 13 rows holds one, to whose size accelerate cuts what it gathers."""
    validation = replace(HELD_OUT, every=4)
    spec = overfitting(Chained(tmp_path), "reward", FULL, validation, max_steps=4, rows=18)
    assert on_processes(spec) == [0, 0], logs(spec)
    loss, accuracy = by_hand(spec, held_out_rows(spec))
    assert accuracy not in (0.0, 1.0)
    assert manifest(spec)["validation/loss"] == pytest.approx(loss, rel=1e-5)
    assert manifest(spec)["validation/accuracy"] == pytest.approx(accuracy)


def content(spec: StageSpec) -> dict[str, bytes]:
    """The bytes of every file of the artifact that measures no time."""
    timed = ("manifest.json", "metrics.jsonl")
    files = (path for path in sorted(spec.artifact.rglob("*")) if path.is_file() and path.name not in timed)
    return {path.relative_to(spec.artifact).as_posix(): path.read_bytes() for path in files}


def untimed(spec: StageSpec) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines(spec)]


@needs_deepspeed
@pytest.mark.parametrize(
    ("kind", "adapter", "sharding", "kill_after"),
    [
        ("sft", FULL, NONE, 16),  # after a best step that the checkpoint has, and later looks
        ("dpo", LORA, ZERO3, 5),  # after looks that no checkpoint has
    ],
    ids=lambda value: getattr(getattr(value, "kind", value), "value", value),
)
def test_a_killed_stage_hands_on_the_same_bytes(
    tmp_path: Path, kind: str, adapter: AdapterConfig, sharding: Sharding, kill_after: int
) -> None:
    world_size, specs = 1 if sharding is NONE else 2, []
    for killed in (False, True):
        chained = Chained(tmp_path / str(killed))
        shorter = {"rate": 0.1, "max_steps": 6} if sharding is ZERO3 else {}
        spec = replace(overfitting(chained, kind, adapter, **shorter), sharding=sharding)
        if killed:
            assert on_processes(spec, world_size=world_size, kill_after=kill_after) == [-9] * world_size, logs(spec)
            assert (spec.work / "content" / "metrics.jsonl").is_file()
        assert on_processes(spec, world_size=world_size) == [0] * world_size, logs(spec)
        assert not spec.work.exists()
        specs.append(spec)
    straight, killed_spec = specs
    assert manifest(straight)["validation/step"] < manifest(straight)["validation/last_step"]
    assert untimed(killed_spec) == untimed(straight)
    assert manifest(killed_spec) == manifest(straight)
    moved = {name: held.replace(b"/True/", b"/False/") for name, held in content(killed_spec).items()}
    assert moved == content(straight)
    assert not [name for name in content(straight) if "best" in name]


def test_a_stage_that_its_patience_ended_takes_no_step_more_when_it_goes_on(tmp_path: Path) -> None:
    """Its checkpoint is of the step at which it ended, whatever ``save_every`` says."""
    chained, validation = Chained(tmp_path), replace(HELD_OUT, patience=1)
    spec = overfitting(chained, "sft", FULL, validation, max_steps=40, save_every=1)
    assert on_processes(spec, world_size=1) == [0], logs(spec)
    last = int(manifest(spec)["validation/last_step"])
    before = content(spec)
    again = overfitting(Chained(tmp_path / "again"), "sft", FULL, validation, max_steps=40, save_every=40)
    assert on_processes(again, world_size=1, kill_after=last, killed_when="sealed") == [-9], logs(again)
    assert list(again.work.glob(f"checkpoints/checkpoint-{last}/alignment_checkpoint.json"))
    assert on_processes(again, world_size=1) == [0], logs(again)
    assert {name: held.replace(b"/again/", b"/") for name, held in content(again).items()} == before
    assert untimed(again) == untimed(spec)
    assert manifest(again) == manifest(spec)
