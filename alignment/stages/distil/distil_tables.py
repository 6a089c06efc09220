"""A student's figures as lines for the terminal, and as a table for pages and model cards."""

from __future__ import annotations

from pathlib import Path

from alignment.records.interval import Interval
from alignment.records.stages import DISTILLATION_FILE, Assisted, Distillation, StudentFigures, Timing
from alignment.stages.base import Cell, ResultTable


def lines(artifact: Path) -> list[str]:
    """The acceptance before and after, and the measured time; nothing without held-out prompts."""
    if not (artifact / DISTILLATION_FILE).is_file():
        return []
    record = Distillation.read(artifact)
    before, after = record.before.acceptance, record.after.acceptance
    sentences = [
        f"{artifact.name}: acceptance of drafted tokens {_words(before)} before and {_words(after)} after, on "
        f"{record.prompts} held-out prompts"
    ]
    if record.timing is not None:
        timing = record.timing
        sentences.append(
            f"{artifact.name}: greedy answers are made {timing.speed_up(timing.before):.2f} times as fast with the "
            f"draft before training and {timing.speed_up(timing.after):.2f} times as fast after it; "
            f"{_differing(timing)}"
        )
    return sentences


def _differing(timing: Timing) -> str:
    number = timing.before.differing + timing.after.differing
    if not number:
        return f"all {timing.prompts} answers are the same as without a draft"
    gap = max(timing.before.widest_gap, timing.after.widest_gap)
    return (
        f"{number} of {2 * timing.prompts} answers differ from those without a draft, first at a token where the "
        f"logits differ by at most {gap:.2g}"
    )


def tables(artifact: Path) -> list[ResultTable]:
    """The student before and after it learned."""
    record = Distillation.read(artifact)
    timing = record.timing
    columns = {
        "acceptance": f"acceptance at temperature {record.temperature:g}",
        "tokens": f"expected tokens per step, {record.gamma} drafted",
        "same": "same most likely token",
        "divergence": "divergence, nats per token",
    }
    if timing is not None:
        columns |= {
            "sampling": "expected speed-up, sampling",
            "greedy": "expected speed-up, greedy",
            "measured": "measured speed-up, greedy",
        }
    rows = [
        ("before", _cells(record.before, timing, None if timing is None else timing.before)),
        ("after", _cells(record.after, timing, None if timing is None else timing.after)),
    ]
    return [ResultTable(title="Compared with its teacher", note=_note(record), columns=columns, rows=rows)]


def _cells(figures: StudentFigures, timing: Timing | None, assisted: Assisted | None) -> list[Cell]:
    intervals = [figures.acceptance, figures.tokens_per_step, figures.same_top, figures.divergence]
    if timing is None or assisted is None:
        return [_cell(interval) for interval in intervals]
    intervals += [assisted.expected_sampling, assisted.expected]
    return [*(_cell(interval) for interval in intervals), Cell(text=f"{timing.speed_up(assisted):.2f}")]


def _note(record: Distillation) -> str:
    note = (
        f"{_student(record)} on {record.tokens} tokens of the teacher's answers to {record.prompts} held-out prompts. "
        "Acceptance is the mean of Σ min(p, q), the probability that speculative sampling keeps a drafted token "
        "(Leviathan et al. 2023). 95 % intervals over prompts."
    )
    if record.timing is None:
        return note
    return (
        f"{note} A token of the draft takes {record.timing.cost_ratio:.2f} of the teacher's time. Greedy answers, one "
        f"at a time, by transformers: {_differing(record.timing)}."
    )


def _student(record: Distillation) -> str:
    if record.layers is None:
        return "The student"
    return f"The student, the first {'layer' if record.layers == 1 else f'{record.layers} layers'},"


def _cell(interval: Interval) -> Cell:
    bounds = "" if interval.bounds is None else f"{interval.bounds[0]:.3f} to {interval.bounds[1]:.3f}"
    return Cell(text=f"{interval.mean:.3f}", bounds=bounds)


def _words(interval: Interval) -> str:
    if interval.bounds is None:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} ({interval.bounds[0]:.3f} to {interval.bounds[1]:.3f})"
