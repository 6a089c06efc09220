"""``align plan``: what would run and why, what it would cost, and the jobs that it would submit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.commands.shared.arguments import add_recipe, add_verify, recipe_of
from alignment.config.typed import to_plain
from alignment.core.errors import ConfigError
from alignment.core.files import new_folder, write_text
from alignment.core.terminal import print_whole
from alignment.core.wording import duration
from alignment.costs.devices import THIS
from alignment.pipeline.backends import slurm, slurm_jobs
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.backends.slurm_jobs import TEMPLATE
from alignment.pipeline.execute import estimates
from alignment.pipeline.execute.shown_plan import show_plan
from alignment.pipeline.plan.plan import Plan
from alignment.records.cost import RunCost, StageCost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides."""
    add_recipe(parser)
    add_verify(parser)
    add = parser.add_argument
    add(
        "--cost",
        action="store_true",
        help="also estimate memory, FLOP and time of each stage, without loading any weights",
    )
    add("--device", default="this", help="estimate for this GPU, such as h100 (default: this machine)")
    add("--trade", action="store_true", help="also estimate each stage with every training method (full, LoRA, …)")
    add("--json", action="store_true", help="print the plan and all settings as JSON")
    add("--scripts", metavar="FOLDER", help="write the jobs that a run would submit to Slurm to this new folder")


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Shows the plan; returns the exit code."""
    if arguments.json:
        print_json(arguments)
        return 0
    options = {name: getattr(arguments, name) for name in ("cost", "device", "trade", "scripts")}
    show(console, recipe_of(arguments), arguments.overrides, verified=arguments.verify, **options)
    return 0


def print_json(arguments: argparse.Namespace) -> None:
    """Prints what ``alignment.plan`` returns. Raises what it raises, and ConfigError: with ``--scripts``."""
    from alignment.api.calls import plan  # only here, because it imports all that a run needs

    if arguments.scripts is not None:
        raise ConfigError("not with --scripts, which writes files; call align plan twice", where="--json")
    options = {name: getattr(arguments, name) for name in ("cost", "device", "trade", "verify")}
    planned = plan(recipe_of(arguments), arguments.overrides, quiet=True, **options)
    print(json.dumps(to_plain(planned), default=str, indent=2, ensure_ascii=False))


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
    ``verified``, otherwise with their sizes. Raises AlignmentError, ConfigError, ModelError."""
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    cost = estimates.is_wanted(cost=cost, device=device)
    plan = estimates.checked_plan(recipe, overrides, cost=cost, trade=trade, device=device, verified=verified)
    files = None if scripts is None else _job_scripts(plan, scripts)
    show_plan(console, plan)
    if cost or trade:
        estimated = estimates.estimated(plan, device=device, trade=trade, announce=say)
        show_cost(console, estimated, free=estimates.free_disk(plan) if device == THIS else None)
        if trade:
            show_trades(console, plan.recipe, estimated)
    elif (known := estimates.known_costs(plan)) is not None:
        show_cost(console, known, free=estimates.free_disk(plan), is_earlier=True)
    else:
        say("--cost shows how much memory and time it would take")
    if reason := why_not_here(plan):
        say(f"this machine cannot start it: {reason}")
    if files is not None:
        for file, text in files.items():
            file.parent.mkdir(exist_ok=True)
            write_text(file, text)
            say(f"written: {file}")
        order = "a run would submit them in this order; each job waits until the one before has ended well"
        say(order if files else "no job scripts, because nothing has to run")


_GB = 1e9
_PARTS = ("weights", "gradients", "optimiser", "activations", "cache", "logits", "DDP", "DeepSpeed")
_NONE = "–"
_SHOWN = 0.005 * _GB


def show_cost(console: Console, cost: RunCost, *, free: float | None = None, is_earlier: bool = False) -> None:
    """A line for each stage: memory, the size of its result, work, time, and what holds the memory at its peak.
    ``free`` are the bytes of the disk that results go to. If the cost ``is_earlier``, settings that need less were
    sought for the memory of then."""
    table = _table("stage", "trains", "memory", "disk", "steps", "tokens", "FLOP", "time", "at the peak, in GB")
    for stage in cost.stages:
        table.add_row(*_cells(stage))
    print_whole(console, table)
    remarks = [line for stage in cost.stages for line in _remarks(stage, cost, is_earlier=is_earlier)]
    for line in (*remarks, *_totals(cost, free)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _totals(cost: RunCost, free: float | None) -> Iterator[str]:
    """Whether each stage fits into the memory, the time of all, and what the run needs on the disk, of which so much is
    ``free``; what is not known of each stage is left out."""
    failed = any(stage.error for stage in cost.stages)
    if cost.memory and not failed and all(stage.peak <= cost.memory for stage in cost.stages):
        spare = cost.memory - max((stage.peak for stage in cost.stages), default=0)
        yield f"memory: each stage fits into {_gb(cost.memory)} GB, with at least {_gb(spare)} GB to spare"
    if not failed and not any(stage.first_rows for stage in cost.stages):
        line = f"time: {duration(sum(stage.seconds for stage in cost.stages))} for all stages"
        if cost.device != THIS:
            line += ", without importing libraries and without downloading, reading and storing files"
        elif cost.startup:
            line += f", and {duration(cost.startup)} to import the libraries once"
        yield line
    if not failed:
        line = f"disk: {_gb(cost.disk)} GB for results and for the checkpoints of a stage while it trains"
        too_little = free is not None and cost.disk > free
        yield (
            f"{line}; only {_gb(free or 0)} GB are free; set output to a folder on a larger disk"
            if too_little
            else line
        )


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


def _job_scripts(plan: Plan, to: str) -> dict[Path, str]:
    """Content by file, in a new folder ``to``, for each stage that has to run, in the order of submission."""
    option = "--scripts"
    if slurm.submission(plan.config.launch) is None:
        remedy = f"add launch/backend=slurm, or leave out {option}"
        raise ConfigError("this plan does not run on Slurm, so there are no job scripts", where=option, remedy=remedy)
    folder = new_folder(to, option=option)
    files = slurm_jobs.job_files(plan, [stage for stage in plan.stages if stage.has_to_run])
    return {folder / f"{stage}{TEMPLATE.suffix}": text for stage, text in files.items()}
