"""``align plan``: which stages would run and why, what they would need, and whether this machine could start them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from alignment.commands.plan.cost_table import show_cost, show_trades
from alignment.core import hardware
from alignment.core.errors import ConfigError, ModelError
from alignment.costs.devices import DEVICES, THIS
from alignment.pipeline.backends.feasibility import refuse_sizes, why_not_here
from alignment.pipeline.execute import estimates
from alignment.pipeline.execute.summary import show_plan
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.sources.model_sources import resolve, resolve_shapes
from alignment.records.cost import RunCost


def show(
    console: Console,
    recipe: str,
    overrides: Sequence[str],
    *,
    cost: bool = False,
    device: str = THIS,
    trade: bool = False,
) -> None:
    """Prints the plan and trains nothing; with ``cost``, also what the stages would need on ``device``, and with
    ``trade``, what every way of training them would need.

    Raises:
        AlignmentError: a fault in the plan, or sizes that no machine can combine.
        ConfigError: ``device`` is not known.
        ModelError: a model is not on this machine, so there is no configuration for its cost.
    """
    if device not in (THIS, *DEVICES):
        raise ConfigError(f"no device '{device}'", where="--device", remedy=f"one of {', '.join((THIS, *DEVICES))}")
    if (cost or trade) and device == THIS and hardware.count_devices():
        raise ConfigError(
            "this machine has a GPU, whose operations are not timed",
            where="--cost" if cost else "--trade",
            remedy=f"name it: --device {' | '.join(DEVICES)}",
        )
    plan = make_plan(recipe, overrides, find=resolve_shapes if cost or trade else resolve)
    refuse_sizes(plan)
    show_plan(console, plan)
    if cost or trade:
        _show_cost(console, plan, device=device, trade=trade)
    else:
        _show_known(console, plan)
    if reason := why_not_here(plan):
        console.print(f"this machine cannot start it: {reason}", markup=False, highlight=False, soft_wrap=True)


def _show_cost(console: Console, plan: Plan, *, device: str, trade: bool) -> None:
    for model in (plan.base, *plan.sources.values()):
        if not model.ready:
            raise ModelError(
                f"{model.source} is not on this machine, and its configuration is needed",
                where="--cost",
                remedy="make model fetches the bundled one",
            )
    memory = hardware.free_memory() if device == THIS else DEVICES[device].memory
    cost = estimates.estimate(
        plan,
        device=device,
        memory=memory,
        trade=trade,
        announce=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    show_cost(console, cost, free=estimates.free_disk(plan) if device == THIS else None)
    if trade:
        show_trades(console, plan.recipe, cost)


def _show_known(console: Console, plan: Plan) -> None:
    """What was estimated before for stages with these settings."""
    stages = [known for stage in plan.stages if (known := estimates.known(plan, stage, device=THIS)) is not None]
    if stages:
        cost = RunCost(device=THIS, memory=hardware.free_memory(), stages=stages)
        show_cost(console, cost, free=estimates.free_disk(plan))
    else:
        console.print("--cost says what memory and time it would take", highlight=False)
