"""A plan on the screen."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from alignment.core.screen_tables import grid
from alignment.pipeline.execute import notes
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan


def show_plan(console: Console, plan: Plan) -> None:
    """A line for each stage: what happens to it, and why; then the hub data and user code that a run would use, and
    notes."""
    console.print(f"[bold]{escape(plan.config.name)}[/]  {escape(plan.config.summary)}", highlight=False)
    table = grid()
    for stage in plan.stages:
        colour = "green" if stage.has_to_run else "cyan"
        table.add_row(escape(stage.name), f"[{colour}]{stage.action.value}[/]", escape(stage.reason))
    console.print(table)
    if plan.store is not None:
        console.print(f"store: {plan.store.url}", markup=False, highlight=False, soft_wrap=True)
    for stage in plan.stages:
        for remark in notes.of_stage(plan, stage):
            console.print(f"{stage.name} {remark}", markup=False, highlight=False, emoji=False, soft_wrap=True)
    for note in notes.on_a_plan(plan):
        console.print(f"note: {note}", markup=False, highlight=False, emoji=False, soft_wrap=True)
    to_run = sum(stage.has_to_run for stage in plan.stages)
    fetched = sum(stage.action is Action.fetch for stage in plan.stages)
    stored = f", {fetched} of them from the store" if fetched else ""
    console.print(f"{to_run} to run, {len(plan.stages) - to_run} reused{stored}", highlight=False)
