"""``align plan``: which stages would run and why, what they would need, and whether this machine could start them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from alignment.commands.plan.cost_table import show_cost, show_trades
from alignment.commands.plan.job_scripts import job_scripts, write_scripts
from alignment.costs.devices import THIS
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute import estimates, planned_costs
from alignment.pipeline.execute.plan_table import show_plan
from alignment.pipeline.plan.plan import Plan


def show(
    console: Console,
    recipe: str,
    overrides: Sequence[str],
    *,
    cost: bool = False,
    device: str = THIS,
    trade: bool = False,
    scripts: str | None = None,
    verified: bool = False,
) -> None:
    """Prints the plan and trains nothing; with ``cost`` or another ``device``, also what the stages would need on
    ``device``, and with ``trade``, what every way of training them would need. The jobs that a run would submit to
    Slurm are written to the new folder ``scripts``, if one is given. Results to reuse are compared with their hashes if
    ``verified``, otherwise with their sizes.

    Raises:
        AlignmentError: a fault in the plan, or sizes that no machine can combine.
        ConfigError: ``device`` is not known, or there can be no ``scripts``.
        ModelError: a model is not on this machine, so there is no configuration for its cost.
    """
    cost = planned_costs.is_wanted(cost=cost, device=device)
    plan = planned_costs.checked_plan(recipe, overrides, cost=cost, trade=trade, device=device, verified=verified)
    files = None if scripts is None else job_scripts(plan, scripts)
    show_plan(console, plan)
    if cost or trade:
        _show_cost(console, plan, device=device, trade=trade)
    else:
        _show_known(console, plan)
    if reason := why_not_here(plan):
        console.print(f"this machine cannot start it: {reason}", markup=False, highlight=False, soft_wrap=True)
    if files is not None:
        write_scripts(console, files)


def _show_cost(console: Console, plan: Plan, *, device: str, trade: bool) -> None:
    cost = planned_costs.estimated(
        plan,
        device=device,
        trade=trade,
        announce=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    show_cost(console, cost, free=estimates.free_disk(plan) if device == THIS else None)
    if trade:
        show_trades(console, plan.recipe, cost)


def _show_known(console: Console, plan: Plan) -> None:
    """What was estimated before for stages with these settings."""
    if (cost := planned_costs.known(plan)) is not None:
        show_cost(console, cost, free=estimates.free_disk(plan), is_earlier=True)
    else:
        console.print("--cost shows how much memory and time it would take", highlight=False)
