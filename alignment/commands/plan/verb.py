"""``align plan``: its arguments, and what they call."""

from __future__ import annotations

import argparse

from rich.console import Console

from alignment.commands.shared.arguments import add_recipe, add_verify, recipe_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides."""
    add_recipe(parser)
    add_verify(parser)
    parser.add_argument(
        "--cost",
        action="store_true",
        help="also estimate memory, FLOP and time of each stage, without loading any weights",
    )
    parser.add_argument("--device", default="this", help="estimate for this GPU, such as h100 (default: this machine)")
    parser.add_argument(
        "--trade", action="store_true", help="also estimate each stage with every training method (full, LoRA, …)"
    )
    parser.add_argument(
        "--scripts", metavar="FOLDER", help="write the jobs that a run would submit to Slurm to this new folder"
    )


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows the plan; returns the exit code."""
    recipe = recipe_of(arguments)
    from alignment.commands.plan.driver import show

    show(
        console,
        recipe,
        arguments.overrides,
        cost=arguments.cost,
        device=arguments.device,
        trade=arguments.trade,
        scripts=arguments.scripts,
        verified=arguments.verify,
    )
    return 0
