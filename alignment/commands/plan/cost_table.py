"""Tables of what stages would need."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.core.screen_tables import print_whole
from alignment.costs.devices import THIS
from alignment.pipeline.execute.durations import duration
from alignment.records.cost import RunCost, StageCost

_GB = 1e9
_PARTS = ("weights", "gradients", "optimiser", "activations", "cache", "logits", "DDP", "DeepSpeed")
_NONE = "–"
_SHOWN = 0.005 * _GB


def show_cost(console: Console, cost: RunCost, *, free: float | None = None, is_earlier: bool = False) -> None:
    """A line for each stage: memory, the size of its result, work, time, and what holds the memory at its peak.

    ``free`` are the bytes of the disk that results go to. If the cost ``is_earlier``, settings that need less were
    sought for the memory of then.
    """
    table = _table("stage", "trains", "memory", "disk", "steps", "tokens", "FLOP", "time", "at the peak, in GB")
    for stage in cost.stages:
        table.add_row(*_cells(stage))
    print_whole(console, table)
    for stage in cost.stages:
        for line in _remarks(stage, cost, is_earlier=is_earlier):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (_fit_line(cost), _time_line(cost), _disk_line(cost, free)):
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _time_line(cost: RunCost) -> str:
    """The time of all stages; empty if it is not known of each."""
    if any(stage.error or stage.first_rows for stage in cost.stages):
        return ""
    line = f"time: {duration(sum(stage.seconds for stage in cost.stages))} for all stages"
    if cost.device != THIS:
        return f"{line}, without importing libraries and without downloading, reading and storing files"
    return f"{line}, and {duration(cost.startup)} to import the libraries once" if cost.startup else line


def _fit_line(cost: RunCost) -> str:
    """That each stage fits into the memory; empty if one does not, or if that is not known."""
    if not cost.memory or any(stage.error or stage.peak > cost.memory for stage in cost.stages):
        return ""
    largest = max((stage.peak for stage in cost.stages), default=0)
    return f"memory: each stage fits into {_gb(cost.memory)} GB, with at least {_gb(cost.memory - largest)} GB to spare"


def _disk_line(cost: RunCost, free: float | None) -> str:
    """What the run needs on the disk, and whether so much is ``free``, if that is known; empty if it is not known of
    each stage."""
    if any(stage.error for stage in cost.stages):
        return ""
    line = f"disk: {_gb(cost.disk)} GB for results and for the checkpoints of a stage while it trains"
    if free is None or cost.disk <= free:
        return line
    return f"{line}; only {_gb(free)} GB are free; set output to a folder on a larger disk"


def show_trades(console: Console, recipe: str, cost: RunCost) -> None:
    """A line for each stage and way of training it."""
    table = _table("stage", "trains", "memory", "time", "trained share", "setting")
    for trade in cost.trades:
        table.add_row(
            trade.stage,
            trade.adapter,
            _NONE if trade.error else _gb(trade.peak),
            _NONE if trade.error else duration(trade.seconds),
            f"{trade.trained / trade.weights:.2%}" if trade.weights else _NONE,
            escape(trade.error or " ".join(trade.remedy)),
        )
    print_whole(console, table)
    console.print(f"to use one, append its settings to: align run {recipe}", markup=False, highlight=False)


def _cells(stage: StageCost) -> list[str]:
    if stage.error or not stage.phases:
        return [stage.stage, stage.adapter, *[_NONE] * 7]
    name, phase = max(stage.phases.items(), key=lambda item: (item[1].held, item[1].peak))
    terms = {"fixed": stage.fixed, **{part: phase.parts[part] for part in _PARTS if part in phase.parts}}
    terms["gaps"] = stage.peak - sum(terms.values())
    held = ", ".join(f"{part} {_gb(size)}" for part, size in terms.items() if size >= _SHOWN)
    return [
        stage.stage,
        stage.adapter or "nothing",
        f"{_gb(stage.peak)} GB",
        f"{_gb(stage.result)} GB",
        f"{stage.steps:,}" if stage.steps else _NONE,
        f"{stage.tokens:.1e}" if stage.tokens else _NONE,
        f"{stage.flop:.1e}",
        duration(stage.seconds),
        f"{name}: {held}",
    ]


def _remarks(stage: StageCost, cost: RunCost, *, is_earlier: bool) -> list[str]:
    if stage.error:
        return [f"{stage.stage}: not estimated: {stage.error}"]
    rows = f"{stage.stage}: FLOP and time cover only the first {stage.first_rows:,} rows"
    remarks = [rows] if stage.first_rows else []
    if stage.assumed_tokens:
        remarks.append(f"{stage.stage}: micro_batch_tokens=auto counts as {stage.assumed_tokens:,} tokens")
    if stage.host:
        remarks.append(f"{stage.stage}: {_gb(stage.host)} GB of the host's memory for each process")
    if not cost.memory or stage.peak <= cost.memory:
        return remarks
    way_out = ", even with the settings that were tried"
    if stage.remedy:
        way_out = f"; {_gb(stage.remedy_peak)} GB with {' '.join(stage.remedy)}"
    elif is_earlier:
        way_out = "; --cost looks for settings that fit"
    return [*remarks, f"{stage.stage}: {_gb(stage.peak)} GB do not fit into {_gb(cost.memory)} GB{way_out}"]


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < 2 or number == len(names) - 1 else "right")
    return table


def _gb(size: float) -> str:
    return f"{size / _GB:.2f}"
