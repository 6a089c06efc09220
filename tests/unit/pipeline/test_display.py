"""What is shown while a stage runs."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from alignment.pipeline.execute.display import display_for, duration
from alignment.records.worker import Progress


def progress(phase: str, step: int) -> Progress:
    return Progress(phase=phase, step=step, total=57, figures={"loss": 1.8251, "reward": 0.5})


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (41.4, "41 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (59.7, "1 min 00 s")]
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(told: list[tuple[float, Progress]]) -> list[str]:
    """What is printed without a terminal when a stage is this far after so many seconds, each seen at every poll."""
    screen, clock = StringIO(), Clock()
    display = display_for(Console(file=screen, width=120), clock)
    display.begin("dpo", "beta 0.1 → 0.3")
    for (seconds, now), (until, _) in zip(told, [*told[1:], (told[-1][0] + 1, None)], strict=True):
        for poll in range(2 * int(seconds), 2 * int(until)):
            clock.now = 1000.0 + poll / 2
            display.update(now)
    display.end("dpo", "done", "41 s")
    first, *lines, last = screen.getvalue().splitlines()
    assert first == "dpo: starts (beta 0.1 → 0.3)"
    assert last == "dpo: done  41 s"
    return lines


def test_without_a_terminal_a_line_is_printed_when_a_phase_begins_and_not_at_every_step() -> None:
    told = [(step, progress("training", step)) for step in range(5)]
    assert lines_of([*told, (5, progress("saving", 57))]) == [
        "dpo: training 0/57  loss 1.83  reward 0.5",
        "dpo: saving 57/57, 0 s left  loss 1.83  reward 0.5",
    ]


def test_without_a_terminal_no_line_is_printed_twice() -> None:
    assert lines_of([(0, progress("training", 3)), (400, progress("training", 4)), (800, progress("saving", 4))]) == [
        "dpo: training 3/57  loss 1.83  reward 0.5",
        "dpo: training 4/57, 5 h 53 min left  loss 1.83  reward 0.5",
        "dpo: saving 4/57, 5 h 46 min left  loss 1.83  reward 0.5",
    ]


def test_phases_that_take_turns_are_no_reason_for_more_lines() -> None:
    turns = [("rollouts", {}), ("training", {"objective/score": 0.25})]
    told = [
        (4 * turn, Progress(phase=turns[turn % 2][0], step=8 * (turn // 2), total=800, figures=turns[turn % 2][1]))
        for turn in range(16)
    ]
    assert lines_of(told) == [
        "dpo: rollouts 0/800",
        "dpo: training 0/800  objective/score 0.25",
        "dpo: rollouts 32/800, 12 min 46 s left  objective/score 0.25",
    ]


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("first", [0, 160])
def test_the_time_left_is_told_on_one_line_however_long_a_step_takes(first: int, width: int) -> None:
    """PPO's updates are minutes apart; a stage that goes on from a checkpoint did its first steps at another time."""
    screen, clock = StringIO(), Clock()
    display = display_for(Console(file=screen, width=width, force_terminal=True, color_system=None), clock)
    display.begin("ppo", "nothing made yet")
    for update in range(3):
        for phase in ("rollouts", "training"):
            display.update(
                Progress(phase=phase, step=first + 16 * update, total=320, figures={"objective/score": -0.5})
            )
            clock.now += 100.0
    shown = {0: "56:40", 160: "23:20"}[first]  # at 200 s an update, 200 s of which have passed
    display.end("ppo", "done", "")
    assert f"{first + 32}/320 10:00 elapsed, {shown} left objective/" in screen.getvalue()


def test_on_a_terminal_the_bar_is_gone_when_the_stage_has_ended() -> None:
    screen = StringIO()
    display = display_for(Console(file=screen, width=120, force_terminal=True))
    display.begin("dpo", "nothing made yet")
    display.update(progress("training", 12))
    display.end("dpo", "done", "41 s")
    display.end("sft", "reused", "sft-5f0e9b1c")
    assert "12/57" in screen.getvalue()
    assert "left" not in screen.getvalue(), "what has elapsed is no time left"
    assert "loss 1.83" in screen.getvalue()
    assert "sft-5f0e9b1c" in screen.getvalue().splitlines()[-1]
