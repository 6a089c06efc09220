"""A run drawn for terminals of several sizes."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console

from alignment.pipeline.execute.durations import duration
from alignment.pipeline.execute.run_table import RunTable, sparkline
from alignment.pipeline.execute.run_view import RunView, ShownCurve, StageView
from alignment.records.worker import Progress

CURVE = ShownCurve(title="accuracy", values=[0.5 + 0.005 * step for step in range(60)])
DPO = StageView(
    name="dpo",
    state="running",
    seconds=62.0,
    progress=Progress(phase="training", step=60, total=150, figures={"loss": 0.5}),
    seconds_left=93.0,
    steps_per_second=0.97,
    tokens_per_second=1234.4,
    curve=CURVE,
)
RUN = RunView(
    name="mine",
    state="running",
    stages=[
        StageView(name="sft", state="reused", seconds=200.0, artifact="sft-5f0e9b1c"),
        StageView(name="reward", state="done", seconds=41.0, artifact="reward-77ac01de"),
        DPO,
        StageView(name="ppo", state="waiting", blocked="job 14 PENDING (Resources)"),
        StageView(name="evaluate", state="waiting", waits_for="waits for dpo, ppo"),
    ],
)


def drawn(view: RunView, width: int, rows: int | None = None) -> list[str]:
    screen = StringIO()
    Console(file=screen, width=width, color_system=None).print(RunTable(view, rows=rows))
    return screen.getvalue().splitlines()


def test_a_wide_terminal_shows_everything() -> None:
    bar = "━" * 8 + "╌" * 12
    assert drawn(RUN, 110) == [
        "mine  running, 2 of 5 stages done",
        "= sft       reused   3 min 20 s  sft-5f0e9b1c",
        "✓ reward    done     41 s  reward-77ac01de",
        f"▶ dpo       training  {bar}  60/150  40%  1:02 elapsed  1:33 left",
        "            accuracy 0.795  ▁▁▁▁▁▂▂▂▂▂▃▃▃▃▃▄▄▄▄▄▅▅▅▅▅▆▆▆▆▆▇▇▇▇▇█████  1,234 tokens/s",
        "· ppo       waits: job 14 PENDING (Resources)",
        "· evaluate  waits for dpo, ppo",
    ]


def test_a_narrow_one_leaves_out_what_matters_least() -> None:
    assert drawn(RUN, 60) == [
        "mine  running, 2 of 5 stages done",
        "= sft       reused   3 min 20 s  sft-5f0e9b1c",
        "✓ reward    done     41 s  reward-77ac01de",
        "▶ dpo       training  60/150  40%  1:02 elapsed  1:33 left",
        "            accuracy 0.795  ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██  1,234 tokens/s",
        "· ppo       waits: job 14 PENDING (Resources)",
        "· evaluate  waits for dpo, ppo",
    ]
    assert drawn(RUN, 36)[3:5] == ["▶ dpo       training  60/150", "            accuracy 0.795"]


@pytest.mark.parametrize("width", range(20, 140, 7))
def test_no_line_is_wider_than_the_terminal_nor_padded_to_it(width: int) -> None:
    long = replace(RUN, stages=[replace(stage, name=f"{stage.name}_of_a_long_name") for stage in RUN.stages])
    for view in (RUN, long):
        lines = drawn(view, width)
        assert len(lines) == 7
        assert max(map(len, lines)) <= width
        assert all(line == line.rstrip() for line in lines)


def test_a_low_terminal_shows_the_stages_around_the_running_one() -> None:
    stages = [replace(RUN.stages[1], name=f"done{number}") for number in range(9)]
    stages += [DPO, *(replace(RUN.stages[4], name=f"waits{number}") for number in range(9))]
    lines = drawn(replace(RUN, stages=stages), 60, rows=9)
    assert len(lines) == 9
    assert [" ".join(line.split()[:3]) for line in lines] == [
        "mine running, 9",
        "… 7 stages",
        "✓ done7 done",
        "✓ done8 done",
        "▶ dpo training",
        "accuracy 0.795 ▁▁▂▂▃▃▄▄▅▅▆▆▇▇██",
        "· waits0 waits",
        "· waits1 waits",
        "… 7 stages",
    ]


def test_a_terminal_without_blocks_gets_ascii() -> None:
    content = BytesIO()
    file = TextIOWrapper(content, encoding="ascii")
    Console(file=file, width=80, color_system=None).print(RunTable(RUN))
    file.flush()
    lines = content.getvalue().decode("ascii").splitlines()
    assert lines[3].startswith("> dpo       training  ########------------  60/150")
    assert lines[4] == "            accuracy 0.795  _____....-----~~~~=====++++****#####  1,234 tokens/s"


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([1.0], 8, "▄"),
        ([2.0, 2.0, 2.0], 8, "▄▄▄"),
        ([0.0, 7.0], 8, "▁█"),
        ([0.0, float("nan"), 1.0], 8, "▁ █"),
        ([float("nan")], 8, " "),
        (list(range(16)), 8, "▁▂▃▄▅▆▇█"),
        ([1.0, 2.0], 0, ""),
    ],
)
def test_a_curve_as_text(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (41.4, "41 s"), (200, "3 min 20 s"), (3600, "1 h 00 min"), (59.7, "1 min 00 s")]
)
def test_durations_read_as_people_say_them(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
