"""Weights & Biases: one id a stage, nothing on the network without a login, and never the reason a training stops."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from alignment.config.stage import SftConfig
from alignment.config.tracking import TrackerKind, TrackingConfig
from alignment.training.context import StageContext
from alignment.training.tracking import Tracker, open_tracker, stable_id
from tests.tiny import tiny_spec


def test_the_id_is_the_same_for_the_same_stage_of_the_same_run_only() -> None:
    first = stable_id("quickstart", "dpo", "a" * 64)
    assert first == stable_id("quickstart", "dpo", "a" * 64)
    assert len(first) == 16
    others = {stable_id("other", "dpo", "a" * 64), stable_id("quickstart", "ppo", "a" * 64)}
    others |= {stable_id("quickstart", "dpo", "b" * 64), first}
    assert len(others) == 4


def test_without_a_tracker_nothing_happens(context: StageContext) -> None:
    tracker = open_tracker(context)
    tracker.log(1, {"loss": 1.0})
    tracker.summarise({"loss": 1.0})
    tracker.close()
    assert list(context.spec.run_folder.iterdir()) == []


class _Broken:
    """A run whose transport is gone."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_reported_once_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = _Broken()
    tracker = Tracker(run)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    assert run.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases failed and is not used any more in this stage: no route to host"
    ]


def _with_wandb(folder: Path, rank: int = 0) -> StageContext:
    tracking = TrackingConfig(kind=TrackerKind.wandb, project="tests")
    return StageContext(spec=tiny_spec(folder, SftConfig(), tracking=tracking), rank=rank, world_size=2)


def test_only_the_main_process_tracks(tmp_path: Path) -> None:
    context = _with_wandb(tmp_path, rank=1)
    open_tracker(context).log(1, {"loss": 1.0})
    assert list(context.spec.run_folder.iterdir()) == []


def test_a_tracker_that_cannot_start_is_reported_and_the_stage_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        open_tracker(_with_wandb(tmp_path)).log(1, {"loss": 1.0})
    assert "could not start and is not used in this stage: no disk" in caplog.text


def test_an_offline_run_is_written_into_the_run_folder_with_the_stable_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": "", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    context = _with_wandb(tmp_path)
    tracker = open_tracker(context)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.summarise({"loss": 0.5})
    tracker.close()
    identity = stable_id("test", "sft", context.spec.fingerprint)
    files = list(context.spec.run_folder.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 1
    content = files[0].read_bytes()
    assert b"loss" in content
    assert b"test/sft" in content
    assert "Weights & Biases failed" not in caplog.text


def test_sampled_answers_become_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    context = _with_wandb(tmp_path)
    tracker = open_tracker(context)
    tracker.table(
        "samples", [{"answer": "yes", "scorers": {"reward": 0.5}}, {"answer": "no", "scorers": {"reward": 0}}]
    )
    tracker.close()
    (file,) = context.spec.run_folder.rglob("*.table.json")
    told = json.loads(file.read_text())
    assert told["columns"] == ["answer", "scorers"]
    assert told["data"] == [["yes", '{"reward": 0.5}'], ["no", '{"reward": 0}']]
