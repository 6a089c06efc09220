"""Draws a run's stages on a terminal: a line for each, and a second one with the curve of a running stage.

What matters least is left out first where the terminal is narrow, and stages far from the running one where it is low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from alignment.core.wording import clock_face, time_taken
from alignment.pipeline.execute.run_view import RunView, StageView
from alignment.records.worker import Progress

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"
"""For terminals whose encoding lacks blocks."""
GAP = " "
_MIDDLE = 3


def sparkline(values: Sequence[float], width: int, *, ramp: str = BLOCKS) -> str:
    """The whole course of ``values`` in at most ``width`` characters, from the lowest to the highest of ``ramp``. More
    values than characters become means of neighbours. A value that is not finite leaves a gap, and a curve that does
    not move lies in the middle."""
    num_cells, means = min(max(0, width), len(values)), []
    for cell in range(num_cells):
        stretch = values[cell * len(values) // num_cells : (cell + 1) * len(values) // num_cells]
        finite = [value for value in stretch if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    known = [mean for mean in means if math.isfinite(mean)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)

    def level(mean: float) -> str:
        if not math.isfinite(mean):
            return GAP
        return ramp[min(len(ramp) - 1, int((mean - low) / span * len(ramp)))] if span else ramp[_MIDDLE]

    return "".join(map(level, means))


_MARKS = {
    "done": ("✓", "+", "green"),
    "reused": ("=", "=", "cyan"),
    "failed": ("✗", "x", "red"),
    "killed": ("✗", "x", "red"),
    "stopped": ("–", "-", "yellow"),
    "running": ("▶", ">", "bold"),
}
"""The mark of a state, the same in ASCII, and its style."""
_WAITING = ("·", ".", "dim")
_BAR_CELLS = 20
_MOST_CURVE_CELLS, _LEAST_CURVE_CELLS = 40, 8
_LEAST_NAME_CELLS = 8
_MANY_A_SECOND = 100.0
"""Steps a second from which their number is shown beside tokens: rows that are tokenised, say."""
_SHOWN_FIGURES = 3
_GAP = "  "


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a line. Of the pieces that do not fit, those of the lowest ``rank`` are left out."""

    text: str
    rank: int
    style: str = ""


class RunTable:
    """A renderable; of at most ``rows`` lines, if that is given."""

    def __init__(self, view: RunView, *, rows: int | None = None) -> None:
        self._view, self._rows = view, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stages = self._view.stages
        shown = stages if self._rows is None else _near_the_running(stages, self._rows - 1)
        width = options.max_width
        name_cells = max(_LEAST_NAME_CELLS, *(len(stage.name) for stage in shown), 0) if shown else 0
        drawing = _Drawing(width, min(name_cells, max(_LEAST_NAME_CELLS, width // 4)), is_ascii=options.ascii_only)
        yield drawing.header(self._view)
        first, last = (stages.index(shown[0]), stages.index(shown[-1]) + 1) if shown else (0, 0)
        if first:
            yield drawing.left_out(f"{first} stages before these")
        for stage in shown:
            yield from drawing.stage(stage)
        if last < len(stages):
            yield drawing.left_out(f"{len(stages) - last} stages after these")


class _Drawing:
    def __init__(self, width: int, name_cells: int, *, is_ascii: bool) -> None:
        self._width, self._name_cells, self._is_ascii = width, name_cells, is_ascii

    def header(self, view: RunView) -> Text:
        line = Text(view.name, style="bold", no_wrap=True, overflow="ellipsis")
        counts = f"{view.num_complete} of {len(view.stages)} stages done"
        return line.append(f"{_GAP}{view.state}, {counts}", style="not bold")

    def left_out(self, words: str) -> Text:
        return self._line(Text(f"{'...' if self._is_ascii else '…'} {words}", style="dim"))

    def stage(self, stage: StageView) -> list[Text]:
        unicode_mark, ascii_mark, style = _MARKS.get(stage.state, _WAITING)
        line = Text()
        line.append(ascii_mark if self._is_ascii else unicode_mark, style=style)
        name = stage.name
        if len(name) > self._name_cells:
            name = f"{name[: self._name_cells - 1]}{'~' if self._is_ascii else '…'}"
        line.append(f" {name:<{self._name_cells}}", style="" if stage.state != "waiting" else "dim")
        self._append(line, self._parts(stage))
        second = self._curve(stage)
        return [line] if second is None else [line, second]

    def _parts(self, stage: StageView) -> list[_Part]:
        if stage.state == "running" and stage.progress is not None:
            return self._progress(stage, stage.progress)
        if stage.state in ("running", "waiting"):
            words = f"waits: {stage.blocked}" if stage.blocked else stage.waits_for or "starting"
            return [_Part(words, 9, "dim" if stage.state == "waiting" else "")]
        parts = [_Part(f"{stage.state:<7}", 9), _Part(time_taken(stage.seconds, stage.attempts), 8)]
        return [*parts, _Part(stage.artifact if stage.state in ("done", "reused") else "", 1, "dim")]

    def _progress(self, stage: StageView, progress: Progress) -> list[_Part]:
        share = progress.step / progress.total if progress.total else None
        seconds, left = stage.seconds, stage.seconds_left
        return [
            _Part(progress.phase, 9),
            _Part("" if share is None else self._bar(share), 2, "cyan"),
            _Part(steps(progress), 8),
            _Part("" if share is None else f"{share:.0%}", 3),
            _Part("" if seconds is None else f"{clock_face(seconds)} elapsed", 4),
            _Part("" if left is None else f"{clock_face(left)} left", 7),
        ]

    def _bar(self, share: float) -> str:
        filled = round(_BAR_CELLS * min(1.0, max(0.0, share)))
        full, empty = ("#", "-") if self._is_ascii else ("━", "╌")
        return full * filled + empty * (_BAR_CELLS - filled)

    def _curve(self, stage: StageView) -> Text | None:
        if stage.progress is None:
            return None
        line = Text(" " * (self._name_cells + 2))
        pieces = [_Part(figure(stage), 9), _Part("", 5, "cyan"), _Part(speed(stage), 6)]
        if stage.curve is not None:
            texts = [piece.text for piece in pieces if piece.text]
            room = self._width - line.cell_len - sum(len(text) + len(_GAP) for text in texts) - len(_GAP)
            if room >= _LEAST_CURVE_CELLS:
                ramp = ASCII if self._is_ascii else BLOCKS
                drawn = sparkline(stage.curve.values, min(room, _MOST_CURVE_CELLS), ramp=ramp)
                pieces[1] = _Part(drawn, 5, "cyan")
        if not any(piece.text for piece in pieces):
            return None
        self._append(line, pieces)
        return line

    def _append(self, line: Text, parts: Sequence[_Part]) -> None:
        chosen = [part for part in parts if part.text]
        while len(chosen) > 1 and line.cell_len + sum(len(part.text) + len(_GAP) for part in chosen) > self._width:
            chosen.remove(min(chosen, key=lambda part: part.rank))
        for part in chosen:
            line.append(_GAP).append(part.text, style=part.style)
        line.rstrip()
        self._line(line)

    def _line(self, line: Text) -> Text:
        """A terminal that becomes narrower must not wrap a line that was cut to its width: nothing is padded."""
        line.no_wrap, line.overflow = True, "crop" if self._is_ascii else "ellipsis"
        return line


def steps(progress: Progress) -> str:
    """``12/57``, ``12`` if the total is unknown, or nothing before the first step."""
    if progress.total:
        return f"{progress.step:,}/{progress.total:,}"
    return f"{progress.step:,}" if progress.step else ""


def progress_line(progress: Progress | None) -> str:
    """``training 12/57``, or ``starting`` before the first progress."""
    return "starting" if progress is None else f"{progress.phase} {steps(progress)}".rstrip()


def figure(stage: StageView) -> str:
    """The last value of the stage's curve, ``accuracy 0.71``, or the figures that it reports with its progress."""
    finite = [] if stage.curve is None else [value for value in stage.curve.values[-1:] if math.isfinite(value)]
    if stage.curve is not None and finite:
        return f"{stage.curve.title} {finite[0]:.3g}"
    if stage.progress is None:
        return ""
    return _GAP.join(f"{name} {value:.3g}" for name, value in list(stage.progress.figures.items())[:_SHOWN_FIGURES])


def speed(stage: StageView) -> str:
    """``1,234 tokens/s``; of a stage that counts no tokens its steps, ``7,546/s`` or ``2.1/min``."""
    tokens, pace = stage.tokens_per_second, stage.steps_per_second
    if tokens is not None and (pace is None or pace < _MANY_A_SECOND):
        return f"{tokens:,.0f} tokens/s"
    if pace is None:
        return ""
    if pace >= 1:
        return f"{pace:,.0f}/s" if pace >= 10 else f"{pace:.1f}/s"
    return f"{pace * 60:.1f}/min"


def _near_the_running(stages: Sequence[StageView], rows: int) -> list[StageView]:
    """The stages that fit into so many lines, around the first that is running or else is not complete. A stage in
    progress takes two lines, and so do the two that say how many stages are left out."""
    heights = [1 + (stage.progress is not None) for stage in stages]
    if sum(heights) <= rows or not stages:
        return list(stages)
    centre = next((index for index, stage in enumerate(stages) if stage.state == "running"), None)
    if centre is None:
        centre = next((index for index, stage in enumerate(stages) if stage.state not in ("done", "reused")), 0)
    low, high = centre, centre + 1
    while True:
        lines = sum(heights[low:high]) + 2
        if high < len(stages) and lines + heights[high] <= rows and high - centre <= centre - low + 1:
            high += 1
        elif low and lines + heights[low - 1] <= rows:
            low -= 1
        elif high < len(stages) and lines + heights[high] <= rows:
            high += 1
        else:
            return list(stages[low:high])
