"""What is read from the files of a run while they change."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from alignment.core.errors import ArtifactError
from alignment.pipeline.execute.run_view import RunReader, RunView, ShownCurve, StageView
from alignment.stages.registry import curves, headline_curve, kinds, trains
from tests.running import Clock, RunFolder

STARTED = "2026-11-28T13:20:00+00:00"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(run: RunFolder, clock: Clock) -> RunReader:
    started = datetime.fromisoformat(STARTED).astimezone(UTC).timestamp()
    return RunReader(run.folder, clock=clock, now=lambda: started + clock.now - 1000.0)


def stage_of(view: RunView, name: str) -> StageView:
    return next(stage for stage in view.stages if stage.name == name)


def rows(*steps: int, seconds: float, tokens: int) -> list[dict[str, float]]:
    """Lines of steps that take so many seconds and tokens each."""
    return [{"step": n, "seconds": n * seconds, "num_tokens": n * tokens, "rewards/accuracies": n / 10} for n in steps]


def test_every_stage_that_waits_says_for_what(run: RunFolder, reader: RunReader) -> None:
    run.stage("sft", "running", started=STARTED)
    assert [stage.waits_for for stage in reader.look().stages] == [
        "",
        "waits for sft",
        "waits for sft",
        "waits for reward",
    ]
    run.stage("sft", "done", seconds=41.2)
    assert [stage.waits_for for stage in reader.look().stages][1:] == [
        "waits for its turn",
        "waits for its turn",
        "waits for reward",
    ]
    run.stage("reward", "failed", seconds=3.0)
    run.run(state="failed")
    assert [stage.waits_for for stage in reader.look().stages][2:] == ["not started", "needs reward, which failed"]


def test_a_running_stage_has_its_own_curve_its_tokens_and_its_times(
    run: RunFolder, reader: RunReader, clock: Clock
) -> None:
    run.stage("dpo", "running", started=STARTED)
    assert stage_of(reader.look(), "dpo").progress is None
    run.progress("dpo", "training", 2, 20, loss=0.69)
    run.steps("dpo", *rows(1, 2, seconds=4.0, tokens=1000))
    reader.look()
    clock.now += 12.0
    run.progress("dpo", "training", 5, 20, loss=0.5)
    run.steps("dpo", *rows(3, 4, 5, seconds=4.0, tokens=1000))
    clock.now += 1.0
    view = stage_of(reader.look(), "dpo")
    assert view.curve == ShownCurve(title="accuracy", values=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert view.tokens_per_second == 250.0
    assert view.seconds == 13.0
    # From step 1, 4 seconds before the first look, to step 5, 13 seconds after it.
    assert view.steps_per_second == pytest.approx(4 / 17)
    assert view.seconds_left == pytest.approx(15 * 17 / 4)
    clock.now += 10.0
    assert stage_of(reader.look(), "dpo").seconds_left == pytest.approx(15 * 17 / 4 - 10)


def test_the_time_of_a_running_stage_counts_earlier_attempts(run: RunFolder, reader: RunReader, clock: Clock) -> None:
    run.stage("dpo", "running", started=STARTED, attempts=2, earlier_seconds=100.0)
    clock.now += 13.0
    view = stage_of(reader.look(), "dpo")
    assert (view.seconds, view.attempts) == (113.0, 2)


def test_a_stage_that_starts_again_shows_no_figures_of_the_attempt_that_failed(
    run: RunFolder, reader: RunReader, clock: Clock
) -> None:
    run.stage("dpo", "running", started=STARTED)
    run.steps("dpo", *rows(1, 2, 3, seconds=4.0, tokens=1000))
    run.progress("dpo", "loading", loss=2.78)
    view = stage_of(reader.look(), "dpo")
    assert view.progress is not None
    assert view.progress.figures == {}
    assert view.tokens_per_second is None
    assert view.curve is None
    run.progress("dpo", "training", 3, 20, loss=0.6)
    view = stage_of(reader.look(), "dpo")
    assert view.progress is not None
    assert view.progress.figures == {"loss": 0.6}
    assert view.curve is not None


def test_a_count_without_a_total_is_timed_from_when_it_was_first_seen(
    run: RunFolder, reader: RunReader, clock: Clock
) -> None:
    run.stage("sft", "running", started=STARTED)
    run.progress("sft", "tokenising", 8)
    assert stage_of(reader.look(), "sft").steps_per_second is None
    clock.now += 2.0
    run.progress("sft", "tokenising", 508)
    view = stage_of(reader.look(), "sft")
    assert (view.steps_per_second, view.seconds_left) == (250.0, None)


def test_after_the_last_step_no_time_is_left_to_be_told(run: RunFolder, reader: RunReader, clock: Clock) -> None:
    run.stage("sft", "running", started=STARTED)
    for step in (1, 2):
        run.progress("sft", "training", step, 2)
        view = stage_of(reader.look(), "sft")
        clock.now += 1.0
    assert (view.steps_per_second, view.seconds_left) == (1.0, None)


def test_a_stage_that_samples_counts_the_tokens_of_its_answers(run: RunFolder, reader: RunReader) -> None:
    run.run(config={"stages": {"ppo": {"optim": {"batch_size": 16}}}})
    run.stage("ppo", "running", started=STARTED)
    run.progress("ppo", "rollouts", 2, 16)
    run.steps(
        "ppo", *({"step": n, "seconds": 8.0 * n, "response_length": 40.0, "objective/score": 0.1} for n in (1, 2))
    )
    view = stage_of(reader.look(), "ppo")
    assert view.tokens_per_second == 40.0 * 16 / 8
    assert view.curve == ShownCurve(title="score", values=[0.1, 0.1])


def test_half_a_line_is_read_when_it_has_ended_and_a_shorter_file_from_its_start(
    run: RunFolder, reader: RunReader
) -> None:
    run.stage("dpo", "running", started=STARTED)
    run.progress("dpo", "training", 1, 20)
    metrics = run.work("dpo") / "content/metrics.jsonl"

    def values() -> list[float]:
        curve = stage_of(reader.look(), "dpo").curve
        return [] if curve is None else curve.values

    metrics.write_text('{"step": 1, "rewards/accuracies": 0.25}\nnot json\n{"step": 2, "rewards/acc')
    assert values() == [0.25]
    with metrics.open("a") as stream:
        stream.write('uracies": 0.5}\n')
    assert values() == [0.25, 0.5]
    metrics.write_text('{"step": 1, "rewards/accuracies": 0.75}\n')  # resumed from an earlier step
    assert values() == [0.75]


def test_a_stage_that_was_asked_to_stop_is_not_one_that_never_began(run: RunFolder, reader: RunReader) -> None:
    run.stage("sft", "waiting", seconds=12.0)
    run.run(state="interrupted")
    states = {stage.name: stage.state for stage in reader.look().stages}
    assert (states["sft"], states["reward"]) == ("stopped", "waiting")


def test_a_record_that_is_away_for_a_moment_does_not_end_the_view(run: RunFolder, reader: RunReader) -> None:
    before = reader.look()
    (run.folder / "run.json").write_text('{"state":')
    assert reader.look() == before
    with pytest.raises(ArtifactError, match="unreadable"):
        RunReader(run.folder).look()


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_that_trains_names_a_metric_that_it_draws(kind: str) -> None:
    chart = headline_curve(kind, {})
    if trains(kind):
        assert chart is not None
        assert chart.keys[0] in {key for drawn in curves(kind, {}) for key in drawn.keys}
        assert not kinds()[kind].headline or chart.keys == (kinds()[kind].headline,)
