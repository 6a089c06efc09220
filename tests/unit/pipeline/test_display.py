"""What is shown while a stage runs."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from alignment.pipeline.display import display_for, duration
from alignment.pipeline.handover import Progress


def progress(phase: str, step: int) -> Progress:
    return Progress(phase=phase, step=step, total=57, figures={"loss": 1.8251, "reward": 0.5})


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (41.4, "41 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (59.7, "1 min 00 s")]
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_a_line_is_printed_when_the_phase_changes_and_not_at_every_step() -> None:
    screen = StringIO()
    display = display_for(Console(file=screen, width=120))
    display.begin("dpo", "beta 0.1 → 0.3")
    for step in range(5):
        display.update(progress("training", step))
    display.update(progress("saving", 57))
    display.end("dpo", "done", "41 s")
    assert screen.getvalue().splitlines() == [
        "dpo: starts (beta 0.1 → 0.3)",
        "dpo: training 0/57  loss 1.83  reward 0.5",
        "dpo: saving 57/57  loss 1.83  reward 0.5",
        "dpo: done  41 s",
    ]


def test_on_a_terminal_the_bar_is_gone_when_the_stage_has_ended() -> None:
    screen = StringIO()
    display = display_for(Console(file=screen, width=120, force_terminal=True))
    display.begin("dpo", "nothing made yet")
    display.update(progress("training", 12))
    display.end("dpo", "done", "41 s")
    display.end("sft", "reused", "sft-5f0e9b1c")
    assert "12/57" in screen.getvalue()
    assert "loss 1.83" in screen.getvalue()
    assert "sft-5f0e9b1c" in screen.getvalue().splitlines()[-1]
