"""A plan on the screen: which stage starts from which, what each trains and reads, and what happens to it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.config.launch import MachinesBackend, Sharding
from alignment.config.model import SHAPE, AdapterKind
from alignment.config.run import LABELS
from alignment.core.model_files import weights_size
from alignment.core.terminal import print_whole, say
from alignment.core.wording import counted
from alignment.pipeline.backends import slurm
from alignment.pipeline.execute import notes
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.pipeline.plan.row_counts import expected_steps
from alignment.stages.registry import as_trained, kind_of

_STAGE = "stage:"


def show_plan(console: Console, plan: Plan) -> None:
    """The model and the launch; a line for each stage below the one that it starts from; then the hub data and user
    code that a run would use, and notes."""
    config = plan.config
    console.print(f"[bold]{escape(config.name)}[/]  {escape(config.summary)}", highlight=False)
    trackers = [label for name, label in LABELS.items() if getattr(config.tracking, name)]
    say(console, f"model: {_model(plan)}", f"launch: {_launch(plan)}; tracking: {', '.join(trackers) or 'none'}")
    print_whole(console, _table(plan))
    if plan.store is not None:
        say(console, f"store: {plan.store.url}")
    for stage in plan.stages:
        say(console, *(f"{stage.name} {remark}" for remark in notes.of_stage(plan, stage)))
    say(console, *(f"note: {note}" for note in notes.on_a_plan(plan)))
    to_run = sum(stage.has_to_run for stage in plan.stages)
    fetched = sum(stage.action is Action.fetch for stage in plan.stages)
    stored = f", {fetched} of them from the store" if fetched else ""
    console.print(f"{to_run} to run, {len(plan.stages) - to_run} reused{stored}", highlight=False)


def _model(plan: Plan) -> str:
    base, dtype = plan.base, plan.config.model.dtype.value
    if base.folder is None or not base.ready:
        return f"{base.source} in {dtype}, which a run will download"
    size = weights_size(base.folder)
    on_disk = f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
    return f"{base.source} in {dtype}, {on_disk} on disk"


def _launch(plan: Plan) -> str:
    launch = plan.config.launch
    processes = counted(launch.num_processes, "process", "processes") if launch.num_processes else "a process per GPU"
    if launch.sharding is not Sharding.none:
        processes += f" with {launch.sharding.value}"
    machines = launch.backend.num_machines
    if slurm.submission(launch) is not None:
        return f"{processes} on each of {counted(machines, 'machine')}, by Slurm"
    if isinstance(launch.backend, MachinesBackend):
        return f"{processes} on each of {machines} machines"
    return f"{processes} on this machine"


def _table(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("stage", "trains", "rows", "steps", "action", "reason"):
        table.add_column(title, justify="right" if title in ("rows", "steps") else "left", no_wrap=True)
    for drawn, stage in _branches(plan):
        if stage is None:
            table.add_row(escape(drawn))
            continue
        steps = expected_steps(stage.config, stage.seen)
        colour = "green" if stage.has_to_run else "cyan"
        table.add_row(
            escape(f"{drawn}{_other_inputs(stage)}"),
            _trains(stage),
            _rows(stage),
            "" if steps is None else f"{steps:,}",
            f"[{colour}]{stage.action.value}[/]",
            escape(stage.reason),
        )
    return table


def _branches(plan: Plan) -> Iterator[tuple[str, PlannedStage | None]]:
    """Each stage as a branch of the model that it starts from, which has no stage if it comes from outside the run."""
    starting: dict[str, list[PlannedStage]] = {}
    for stage in plan.stages:
        starting.setdefault(_start(stage), []).append(stage)

    def below(origin: str, indent: str) -> Iterator[tuple[str, PlannedStage]]:
        stages = starting.get(origin, [])
        for number, stage in enumerate(stages, start=1):
            is_last = number == len(stages)
            yield f"{indent}{'└─► ' if is_last else '├─► '}{stage.name}", stage
            yield from below(f"{_STAGE}{stage.name}", indent + ("    " if is_last else "│   "))

    for origin, stages in starting.items():
        if not origin:
            for stage in stages:
                yield stage.name, stage
                yield from below(f"{_STAGE}{stage.name}", "")
        elif not origin.startswith(_STAGE):
            yield origin, None
            yield from below(origin, "")


def _start(stage: PlannedStage) -> str:
    """The model that the stage starts from, or the only stage whose result it reads; empty if there are several."""
    if "init" in stage.inputs:
        return stage.inputs["init"].ref
    inputs = _inputs(stage)
    is_one_stage = len(inputs) == 1 and inputs[0].startswith(_STAGE) and not kind_of(stage.config).in_driver
    return inputs[0] if is_one_stage else ""


def _inputs(stage: PlannedStage) -> list[str]:
    return list(dict.fromkeys(given.ref for given in (*stage.inputs.values(), *stage.arms.values())))


def _other_inputs(stage: PlannedStage) -> str:
    if kind_of(stage.config).in_driver:
        return " ◄ all stages"
    others = [ref.removeprefix(_STAGE) for ref in _inputs(stage) if ref != _start(stage)]
    return f" ◄ {', '.join(others)}" if others else ""


def _trains(stage: PlannedStage) -> str:
    trained = as_trained(stage.config)
    if trained is None:
        return ""
    adapter = trained.adapter
    is_low_rank = adapter.kind not in (AdapterKind.full, AdapterKind.prefix)
    return f"{adapter.kind.value} {SHAPE[0]} {adapter.rank}" if is_low_rank else adapter.kind.value


def _rows(stage: PlannedStage) -> str:
    seen = stage.seen.get("data")
    return "" if seen is None else f"{seen.rows:,}{'' if seen.whole else '+'}"
