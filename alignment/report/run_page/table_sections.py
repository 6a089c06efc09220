"""The tables that a kind of stage brings for its own results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alignment.core.errors import ArtifactError
from alignment.report.kit import text
from alignment.report.run_page.run_records import Stage, Tables
from alignment.stages.base import Cell, ResultTable
from alignment.stages.kind_problems import KindError
from alignment.stages.registry import tables_of


def read_tables(stage: Stage, folder: Path | None) -> Tables:
    """The stage's tables, cleaned for a page, or a note that says why there are none."""
    if folder is None:
        return Tables(stage=stage.name)
    try:
        return Tables(stage=stage.name, tables=[_cleaned(table) for table in tables_of(stage.kind, folder)])
    except KindError as error:
        return Tables(stage=stage.name, note=text.prose(f"The tables of {stage.name} cannot be shown: {error}"))
    except FileNotFoundError:
        return Tables(stage=stage.name, note=f"{stage.name} has no result yet.")
    except ArtifactError:
        return Tables(stage=stage.name, note=f"The result of {stage.name} cannot be read.")


def _cleaned(table: ResultTable) -> ResultTable:
    return replace(
        table,
        title=text.name(table.title),
        note=text.prose(table.note),
        lead=text.prose(table.lead),
        columns={key: text.name(heading) for key, heading in table.columns.items()},
        rows=[(text.name(label, limit=120), [_cell(cell) for cell in cells]) for label, cells in table.rows],
    )


def _cell(cell: Cell) -> Cell:
    return replace(cell, text=text.name(cell.text), bounds=text.name(cell.bounds))


def side_by_side(runs: Sequence[Sequence[Tables]]) -> list[tuple[str, ResultTable]]:
    """One table for each stage and title that runs share, with the arms of each run as columns, by stage.

    Column keys are ``(number of the run)/(key)``; a run without a row gets empty cells.
    """
    titles = dict.fromkeys(
        (of_stage.stage, table.title) for run in runs for of_stage in run for table in of_stage.tables if table.of_arms
    )
    return [(stage, _joined([_table(run, stage, title) for run in runs])) for stage, title in titles]


def _table(run: Sequence[Tables], stage: str, title: str) -> ResultTable | None:
    tables = (table for of_stage in run if of_stage.stage == stage for table in of_stage.tables)
    return next((table for table in tables if table.title == title), None)


def _joined(tables: Sequence[ResultTable | None]) -> ResultTable:
    present = [table for table in tables if table is not None]
    labels = dict.fromkeys(label for table in present for label, _ in table.rows)
    columns = {
        f"{number}/{key}": heading
        for number, table in enumerate(tables)
        if table is not None
        for key, heading in table.columns.items()
        if key in table.of_arms
    }
    rows = [(label, [cell for table in present for cell in _cells(table, label)]) for label in labels]
    return replace(present[0], columns=columns, rows=rows, of_arms=list(columns))


def _cells(table: ResultTable, label: str) -> list[Cell]:
    cells = next((cells for name, cells in table.rows if name == label), [Cell(text="–")] * len(table.columns))
    return [cell for key, cell in zip(table.columns, cells, strict=True) if key in table.of_arms]
