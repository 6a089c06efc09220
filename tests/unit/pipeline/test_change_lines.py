"""Lines for logs: each says something that changed, and none is printed twice."""

from __future__ import annotations

from dataclasses import replace

from alignment.pipeline.execute.display import ChangeLines
from alignment.pipeline.execute.run_view import RunView, ShownCurve, StageView
from alignment.records.worker import Progress

RUNNING = StageView(name="dpo", state="running", reason="beta 0.1 → 0.3", artifact="dpo-5f0e9b1c")


class Log:
    """The lines about a run of one stage that is shown again and again."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.printer = ChangeLines(self.lines.append)

    def show(self, stage: StageView) -> None:
        self.printer.show(RunView(name="mine", state="running", stages=[stage]))

    def steps(self, phase: str, *steps: int, total: int | None = 100) -> list[str]:
        """The new lines when the stage comes to these steps, each seen at two looks."""
        before = len(self.lines)
        for step in steps:
            for _ in range(2):
                self.show(replace(RUNNING, progress=Progress(phase=phase, step=step, total=total)))
        return self.lines[before:]


def test_a_stage_has_a_line_when_it_starts_at_each_tenth_and_when_it_ends() -> None:
    log = Log()
    log.show(replace(RUNNING, state="waiting"))
    assert log.lines == [], "a stage that has not begun is no change"
    log.show(RUNNING)
    assert log.steps("training", *range(101)) == [
        "dpo: training 0/100",
        *(f"dpo: training {step}/100" for step in range(10, 101, 10)),
    ]
    log.show(replace(RUNNING, state="done", seconds=41.2))
    log.show(replace(RUNNING, state="done", seconds=41.2))
    assert log.lines[0] == "dpo: starts (beta 0.1 → 0.3)"
    assert log.lines[-1] == "dpo: done  41 s  dpo-5f0e9b1c"
    assert len(log.lines) == 13


def test_a_line_says_how_fast_it_goes_how_long_it_takes_and_how_well() -> None:
    log = Log()
    curve = ShownCurve(title="accuracy", values=[0.5, 0.712])
    progress = Progress(phase="training", step=50, total=100, figures={"loss": 0.6})
    stage = replace(RUNNING, progress=progress, tokens_per_second=1234.4, seconds_left=62.0)
    log.show(replace(stage, curve=curve))
    assert log.lines[-1] == "dpo: training 50/100, 1,234 tokens/s, 1 min 02 s left  accuracy 0.712"
    log.show(replace(stage, progress=replace(progress, step=60)))
    assert log.lines[-1] == "dpo: training 60/100, 1,234 tokens/s, 1 min 02 s left  loss 0.6"


def test_a_phase_that_comes_again_and_again_is_not_printed_again() -> None:
    """A stage that loads a model for each of its arms said ``loading`` every half minute, for hours."""
    log = Log()
    for arm in range(4):
        log.steps("loading", 0, total=None)
        log.steps("answering", *range(25 * arm, 25 * arm + 25))
    assert [line for line in log.lines if "loading" in line] == ["dpo: loading"]
    assert len(set(log.lines)) == len(log.lines)
    assert len([line for line in log.lines if "answering" in line]) == 10


def test_phases_that_take_turns_count_their_steps_once() -> None:
    log = Log()
    for step in range(0, 100, 2):
        log.steps("rollouts", step)
        log.steps("training", step)
    expected = ["dpo: rollouts 0/100", "dpo: training 0/100"] + [f"dpo: rollouts {n}/100" for n in range(10, 100, 10)]
    assert log.lines[1:] == expected


def test_without_a_total_a_line_comes_when_the_number_gets_another_digit() -> None:
    assert Log().steps("tokenising", *range(1001), total=None)[1:] == [
        "dpo: tokenising",
        "dpo: tokenising 1",
        "dpo: tokenising 10",
        "dpo: tokenising 100",
        "dpo: tokenising 1,000",
    ]


def test_a_queue_that_changes_its_mind_is_heard_once() -> None:
    log = Log()
    waiting = replace(RUNNING, state="waiting")
    for reason in ("Priority", "Resources", "Priority", "Resources"):
        log.show(replace(waiting, blocked=f"job 12 PENDING ({reason})"))
    assert log.lines == ["dpo: job 12 PENDING (Priority)", "dpo: job 12 PENDING (Resources)"]


def test_what_ended_before_the_first_look_is_no_change() -> None:
    log = Log()
    states = ("done", "failed", "stopped", "reused")
    stages = [replace(RUNNING, name=f"of_{state}", state=state, seconds=12.0) for state in states]
    log.printer.show(RunView(name="mine", state="running", stages=stages))
    assert log.lines == ["of_reused: reused  dpo-5f0e9b1c"]


def test_a_warning_is_printed_once() -> None:
    log = Log()
    for _ in range(3):
        log.printer.note("dpo: TensorBoard failed")
    assert log.lines == ["dpo: TensorBoard failed"]


def test_a_stage_that_stops_or_fails_says_so() -> None:
    for state, line in (
        ("stopped", "dpo: stopped  12 s"),
        ("failed", "dpo: failed  12 s"),
        ("waiting", "dpo: stopped"),
    ):
        log = Log()
        log.show(RUNNING)
        log.show(replace(RUNNING, state=state, seconds=None if state == "waiting" else 12.0))
        assert log.lines[1:] == [line]
