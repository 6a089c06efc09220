"""A run while it goes on: what is read from its files, the table on a terminal, and the lines in a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from alignment.core.errors import ArtifactError
from alignment.core.wording import duration
from alignment.pipeline.execute.display import ChangeLines, announcer, showing
from alignment.pipeline.execute.run_table import RunTable, sparkline
from alignment.pipeline.execute.run_view import RunReader, RunView, ShownCurve, StageView
from alignment.records.worker import Progress
from tests.running import Clock, RunFolder, Terminal

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


def stage_of(reader: RunReader, name: str) -> StageView:
    return next(stage for stage in reader.look().stages if stage.name == name)


def rows(*steps: int) -> list[dict[str, float]]:
    return [{"step": n, "seconds": n * 4.0, "num_tokens": n * 1000, "rewards/accuracies": n / 10} for n in steps]


def test_every_stage_that_waits_says_for_what(run: RunFolder, reader: RunReader) -> None:
    def waits() -> list[str]:
        return [stage.waits_for for stage in reader.look().stages]

    run.stage("sft", "running", started=STARTED)
    assert waits() == ["", "waits for sft", "waits for sft", "waits for reward"]
    run.stage("sft", "done", seconds=41.2)
    assert waits()[1:] == ["waits for its turn", "waits for its turn", "waits for reward"]
    run.stage("reward", "failed", seconds=3.0)
    run.run(state="failed")
    assert waits()[2:] == ["not started", "needs reward, which failed"]


def test_a_running_stage_has_its_curve_tokens_and_times(run: RunFolder, reader: RunReader, clock: Clock) -> None:
    run.stage("dpo", "running", started=STARTED, attempts=2, earlier_seconds=100.0)
    assert stage_of(reader, "dpo").progress is None
    run.steps("dpo", *rows(1, 2))
    run.progress("dpo", "loading", loss=2.78)
    view = stage_of(reader, "dpo")
    assert view.progress is not None
    assert (view.progress.figures, view.curve, view.tokens_per_second) == ({}, None, None), "those of a failed attempt"
    run.progress("dpo", "training", 2, 20, loss=0.69)
    reader.look()
    clock.now += 12.0
    run.progress("dpo", "training", 5, 20, loss=0.5)
    run.steps("dpo", *rows(3, 4, 5))
    clock.now += 1.0
    view = stage_of(reader, "dpo")
    assert view.progress is not None
    assert (view.progress.figures, view.attempts) == ({"loss": 0.5}, 2)
    assert view.curve == ShownCurve(title="accuracy", values=[0.1, 0.2, 0.3, 0.4, 0.5])
    assert (view.tokens_per_second, view.seconds) == (250.0, 113.0)
    # From step 1, 4 seconds before the first look, to step 5, 13 seconds after it.
    assert view.steps_per_second == pytest.approx(4 / 17)
    assert view.seconds_left == pytest.approx(15 * 17 / 4)
    clock.now += 10.0
    assert stage_of(reader, "dpo").seconds_left == pytest.approx(15 * 17 / 4 - 10)


def test_half_a_line_is_read_when_it_has_ended(run: RunFolder, reader: RunReader) -> None:
    run.stage("dpo", "running", started=STARTED)
    run.progress("dpo", "training", 1, 20)
    metrics = run.work("dpo") / "content/metrics.jsonl"

    def values() -> list[float]:
        curve = stage_of(reader, "dpo").curve
        return [] if curve is None else curve.values

    metrics.write_text('{"step": 1, "rewards/accuracies": 0.25}\nnot json\n{"step": 2, "rewards/acc')
    assert values() == [0.25]
    with metrics.open("a") as stream:
        stream.write('uracies": 0.5}\n')
    assert values() == [0.25, 0.5]
    metrics.write_text('{"step": 1, "rewards/accuracies": 0.75}\n')  # resumed from an earlier step
    assert values() == [0.75]


def test_a_record_that_is_away_for_a_moment_does_not_end_the_view(run: RunFolder, reader: RunReader) -> None:
    before = reader.look()
    (run.folder / "run.json").write_text('{"state":')
    assert reader.look() == before
    with pytest.raises(ArtifactError, match="unreadable"):
        RunReader(run.folder).look()


DPO = StageView(
    name="dpo",
    state="running",
    seconds=62.0,
    progress=Progress(phase="training", step=60, total=150, figures={"loss": 0.5}),
    seconds_left=93.0,
    steps_per_second=0.97,
    tokens_per_second=1234.4,
    curve=ShownCurve(title="accuracy", values=[0.5 + 0.005 * step for step in range(60)]),
)
DONE = StageView(name="reward", state="done", seconds=41.0, artifact="reward-77ac01de")
LAST = StageView(name="evaluate", state="waiting", waits_for="waits for dpo, ppo")
STAGES = [
    StageView(name="sft", state="reused", seconds=200.0, artifact="sft-5f0e9b1c"),
    DONE,
    DPO,
    StageView(name="ppo", state="waiting", blocked="job 14 PENDING (Resources)"),
    LAST,
]


def drawn(width: int, stages: Sequence[StageView] = STAGES, rows: int | None = None) -> list[str]:
    screen = StringIO()
    view = RunView(name="mine", state="running", stages=list(stages))
    Console(file=screen, width=width, color_system=None).print(RunTable(view, rows=rows))
    return screen.getvalue().splitlines()


def test_a_wide_terminal_shows_everything_and_a_narrow_one_leaves_out_what_matters_least() -> None:
    lines = [
        "mine  running, 2 of 5 stages done",
        "= sft       reused   3 min 20 s  sft-5f0e9b1c",
        "✓ reward    done     41 s  reward-77ac01de",
        f"▶ dpo       training  {'━' * 8}{'╌' * 12}  60/150  40%  1:02 elapsed  1:33 left",
        "            accuracy 0.795  ▁▁▁▁▁▂▂▂▂▂▃▃▃▃▃▄▄▄▄▄▅▅▅▅▅▆▆▆▆▆▇▇▇▇▇█████  1,234 tokens/s",
        "· ppo       waits: job 14 PENDING (Resources)",
        "· evaluate  waits for dpo, ppo",
    ]
    assert drawn(110) == lines
    lines[3:5] = [
        "▶ dpo       training  60/150  40%  1:02 elapsed  1:33 left",
        "            accuracy 0.795  ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██  1,234 tokens/s",
    ]
    assert drawn(60) == lines
    assert drawn(36)[3:5] == ["▶ dpo       training  60/150", "            accuracy 0.795"]


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [([], 8, ""), ([2.0, 2.0], 8, "▄▄"), ([0.0, float("nan"), 1.0], 8, "▁ █"), (list(range(16)), 8, "▁▂▃▄▅▆▇█")],
)
def test_a_curve_as_text(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line
    assert [duration(seconds) for seconds in (None, 41.4, 59.7, 3600)] == ["", "41 s", "1 min 00 s", "1 h 00 min"]


RUNNING = StageView(name="dpo", state="running", reason="beta 0.1 → 0.3", artifact="dpo-5f0e9b1c")


class Log:
    """The lines about a run that is shown again and again."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.printer = ChangeLines(self.lines.append)

    def show(self, *stages: StageView) -> None:
        self.printer.show(RunView(name="mine", state="running", stages=list(stages)))

    def steps(self, phase: str, *steps: int, total: int | None = 100) -> list[str]:
        before = len(self.lines)
        for step in steps:
            for _ in range(2):
                self.show(replace(RUNNING, progress=Progress(phase=phase, step=step, total=total)))
        return self.lines[before:]


@pytest.fixture
def log() -> Log:
    return Log()


def test_a_stage_has_a_line_when_it_starts_at_each_tenth_and_when_it_ends(log: Log) -> None:
    ended = [replace(RUNNING, name=f"{state}_before", state=state) for state in ("done", "failed", "stopped", "reused")]
    log.show(replace(RUNNING, state="waiting"), *ended)
    assert log.lines == ["reused_before: reused  dpo-5f0e9b1c"], "nothing else is a change"
    log.lines.clear()
    log.show(RUNNING)
    tenths = [f"dpo: training {step}/100" for step in range(0, 101, 10)]
    assert log.steps("training", *range(101)) == tenths
    for _ in range(2):
        log.show(replace(RUNNING, state="done", seconds=41.2))
        log.printer.note("dpo: TensorBoard failed")
    end = ["dpo: done  41 s  dpo-5f0e9b1c", "dpo: TensorBoard failed"]
    assert log.lines == ["dpo: starts (beta 0.1 → 0.3)", *tenths, *end]


def test_a_phase_that_comes_again_and_phases_that_take_turns_are_not_printed_again(log: Log) -> None:
    """A stage that loads a model for each of its arms said ``loading`` every half minute, for hours."""
    for arm in range(4):
        log.steps("loading", 0, total=None)
        log.steps("answering", *range(25 * arm, 25 * arm + 25))
    answers = [f"dpo: answering {step}/100" for step in range(0, 100, 10)]
    assert log.lines[1:] == ["dpo: loading", *answers]
    turns = Log()
    for step in range(0, 100, 2):
        turns.steps("rollouts", step)
        turns.steps("training", step)
    further = [f"dpo: rollouts {step}/100" for step in range(10, 100, 10)]
    assert turns.lines[1:] == ["dpo: rollouts 0/100", "dpo: training 0/100", *further]


class Viewed:
    """A console on a terminal."""

    def __init__(self, columns: int) -> None:
        self._file = StringIO()
        self._read = 0
        self.console = Console(file=self._file, width=columns, height=24, force_terminal=True, color_system=None)
        self._terminal = Terminal(columns, translates=True)

    @property
    def terminal(self) -> Terminal:
        written = self._file.getvalue()
        self._terminal.feed(written[self._read :].encode())
        self._read = len(written)
        return self._terminal

    def narrow(self, columns: int) -> None:
        self.terminal.resize(columns)
        self.console.width = columns


WAITING = ["· reward    waits for sft", "· dpo       waits for sft", "· ppo       waits for reward"]


def test_what_is_printed_stays_above_a_view_that_narrows(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    viewed = Viewed(110)
    announcer(viewed.console)("note: before the run")
    run.stage("sft", "running")
    run.progress("sft", "training", 3, 6, loss=0.5)
    with showing(viewed.console, RunReader(run.folder)) as display:
        for number in range(2):
            display.note(f"warning {number}")
            display.poll()
        print("printed by a library")
        display.poll()
        viewed.narrow(40)
        display.poll()
    assert viewed.terminal.shows_cursor
    assert viewed.terminal.lines == [
        "  note: before the run",
        "  warning 0",
        "  warning 1",
        "printed by a library",
        "mine  running, 0 of 4 stages done",
        "▶ sft       training  3/6  50%",
        "            loss 0.5",
        *WAITING,
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_log_and_a_terminal_that_cannot_move_its_cursor_get_lines(run: RunFolder, is_terminal: bool) -> None:
    screen = StringIO()
    console = Console(file=screen, width=80, force_terminal=is_terminal, _environ={"TERM": "dumb"})
    with showing(console, RunReader(run.folder)) as display:
        run.stage("sft", "running")
        run.progress("sft", "training", 3, 6, loss=0.5)
        for _ in range(3):
            display.poll()
        run.stage("sft", "failed", seconds=2.0)
        display.wait("dpo", "job 12 PENDING (Resources)")
        display.poll()
    assert screen.getvalue().splitlines() == [
        "sft: starts (no result yet)",
        "sft: training 3/6  loss 0.5",
        "sft: failed  2 s",
        "dpo: job 12 PENDING (Resources)",
    ]


def test_a_stage_that_samples_counts_the_tokens_of_its_answers(run: RunFolder, reader: RunReader) -> None:
    run.run(config={"stages": {"ppo": {"optim": {"batch_size": 16}}}})
    run.stage("ppo", "running", started=STARTED)
    run.progress("ppo", "rollouts", 2, 16)
    answers = {"response_length": 40.0, "objective/score": 0.1}
    run.steps("ppo", *({"step": n, "seconds": 8.0 * n, **answers} for n in (1, 2)))
    view = stage_of(reader, "ppo")
    assert view.tokens_per_second == 40.0 * 16 / 8
    assert view.curve == ShownCurve(title="score", values=[0.1, 0.1])


def test_no_line_is_wider_than_the_terminal_nor_padded_to_it_and_a_low_one_has_stages_around_the_running_one() -> None:
    for stages in (STAGES, [replace(stage, name=f"{stage.name}_of_a_long_name") for stage in STAGES]):
        for width in range(20, 140, 7):
            lines = drawn(width, stages)
            assert (len(lines), max(map(len, lines)) <= width) == (7, True)
            assert [line for line in lines if line != line.rstrip()] == []
    done, waits = ([replace(stage, name=f"{stage.state}{n}") for n in range(9)] for stage in (DONE, LAST))
    words = [line.split()[1] for line in drawn(60, [*done, DPO, *waits], rows=9)]
    assert words[1:] == ["7", "done7", "done8", "dpo", "0.795", "waiting0", "waiting1", "7"]
