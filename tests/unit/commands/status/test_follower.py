"""``align status --follow``, beside a run whose files change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands import status as status_verb
from alignment.commands.shared import following
from alignment.commands.status import follow
from alignment.core.locks import held
from alignment.pipeline.execute import run_state
from tests.running import RunFolder

Follow = Callable[..., list[str]]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """A run that goes on: its lock is held."""
    made = RunFolder(tmp_path)
    with held(made.folder / "lock", wait=False):
        yield made


@pytest.fixture
def followed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Follows the run, to which these things happen between two looks; returns the lines that are printed."""

    def call(*happens: Callable[[], object]) -> list[str]:
        coming = iter(happens)
        monkeypatch.setattr(status_verb.time, "sleep", lambda _: next(coming)())
        screen = StringIO()
        follow(Console(file=screen, width=100), run.output, None)
        assert next(coming, None) is None, "it ended before the run"
        return screen.getvalue().splitlines()

    return call


def test_a_run_is_followed_from_the_middle_to_its_end(run: RunFolder, followed: Follow) -> None:
    run.stage("sft", "done", seconds=41.0)
    run.stage("reward", "running")
    run.progress("reward", "training", 10, 100, loss=0.7)
    run.status("reward", state="done", exit_code=0, notes=["TensorBoard failed"])

    def ends() -> None:
        run.stage("reward", "done", seconds=62.0)
        run.run(state="done")

    lines = followed(
        lambda: run.progress("reward", "training", 12, 100, loss=0.7),
        lambda: run.progress("reward", "training", 25, 100, loss=0.6),
        ends,
    )
    assert lines[:2] == ["reward: starts (no result yet)", "reward: training 10/100  loss 0.7"]
    assert lines[2].startswith("reward: training 25/100, ")
    assert lines[3:6] == ["reward: done  1 min 02 s  reward-5f0e9b1c", "reward: TensorBoard failed", "mine: done"]


def test_a_stage_that_fails_is_shown_with_its_error(run: RunFolder, followed: Follow) -> None:
    run.stage("sft", "running")

    def fails() -> None:
        run.status("sft", state="failed", exit_code=6, error="the loss is NaN at step 3")
        run.stage("sft", "failed", seconds=2.0)
        run.run(state="failed")

    assert followed(fails)[1:5] == [
        "sft: failed  2 s",
        "sft: the loss is NaN at step 3",
        f"  log: {run.folder / 'sft/log.txt'}",
        "mine: failed",
    ]


def test_ctrl_c_ends_the_view_and_not_the_run(run: RunFolder, followed: Follow) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert followed(interrupt) == ["mine continues; `align status mine` shows its progress"]


def test_a_run_that_was_killed_is_not_followed_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = RunFolder(tmp_path)
    killed.stage("sft", "running")
    assert cli.main(["status", "--follow", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "sft: killed" in printed
    assert "mine: killed\nmine ended without recording how; the last sign of life was " in printed
    assert "\nrun the same command to continue\n" in printed


def test_a_run_of_another_machine_is_followed_although_its_lock_is_not_seen_here(
    run: RunFolder, followed: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.stage("sft", "running")
    monkeypatch.setattr(run_state, "is_held", lambda _: False)
    monkeypatch.setattr(run_state, "last_host", lambda _: "node7")
    lines = followed(lambda: None, lambda: run.run(state="done"))
    assert lines[0] == "sft: starts (no result yet)"
    assert lines[1].startswith("mine may still be running, which cannot be seen from here (it was started on node7); ")
    assert lines[2:4] == ["if it has ended, run the same command to continue", "mine: done"]


def test_jobs_that_wait_say_why(run: RunFolder, followed: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following.slurm_jobs, "read_jobs", lambda _: {"dpo": "12"})
    states = {"sft": "job 11 RUNNING", "dpo": "job 12 PENDING (Resources)"}
    monkeypatch.setattr(following.slurm_jobs, "states", lambda _: states)
    assert followed(lambda: None, lambda: None, lambda: run.run(state="done"))[:2] == [
        "dpo: job 12 PENDING (Resources)",
        "mine: done",
    ]


def test_without_a_name_the_run_that_goes_on_is_followed_and_without_any_run_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--follow", "--output", str(tmp_path)]) == 2
    assert "configuration: RUN: no readable run under" in capsys.readouterr().err
    RunFolder(tmp_path, "first", state="done", started="2026-11-28T10:00:00+00:00")
    RunFolder(tmp_path, "second", state="done", started="2026-11-28T12:00:00+00:00")
    (tmp_path / "runs/torn").mkdir()
    (tmp_path / "runs/torn/run.json").write_text("{")
    assert cli.main(["status", "--follow", "--output", str(tmp_path)]) == 0
    assert "second: done" in capsys.readouterr().out
    assert cli.main(["status", "--follow", "frist", "--output", str(tmp_path)]) == 2
    assert "did you mean 'first'?" in capsys.readouterr().err
