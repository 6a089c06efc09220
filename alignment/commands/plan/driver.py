"""``align plan``: which stages would run and why, and whether this machine could start them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from alignment.pipeline.backends.feasibility import refuse_sizes, why_not_here
from alignment.pipeline.execute.summary import show_plan
from alignment.pipeline.plan.plan import make_plan


def show(console: Console, recipe: str, overrides: Sequence[str]) -> None:
    """Prints the plan and starts nothing.

    Raises:
        AlignmentError: a fault in the plan, or sizes that no machine can combine.
    """
    plan = make_plan(recipe, overrides)
    refuse_sizes(plan)
    show_plan(console, plan)
    if reason := why_not_here(plan):
        console.print(f"this machine cannot start it: {reason}", markup=False, highlight=False, soft_wrap=True)
