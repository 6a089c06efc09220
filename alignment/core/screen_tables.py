"""Tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_WIDEST = 10_000


def grid() -> Table:
    """An empty table without lines and heads, whose first column is not wrapped."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=10)
    return table


def print_whole(console: Console, table: Table) -> None:
    """Prints a table whose figures are not cut, however narrow the terminal: a long line is better."""
    width = console.width
    console.width = max(width, Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum)
    try:
        console.print(table, crop=False, soft_wrap=True)
    finally:
        console.width = width
