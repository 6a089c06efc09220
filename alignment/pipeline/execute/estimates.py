"""What the stages of a plan would need, by a process that runs them on shadows (alignment/estimate.py)."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.config.launch import DEVICE, LaunchConfig
from alignment.config.model import AdapterKind
from alignment.config.optim import expected_tokens
from alignment.config.typed import to_plain
from alignment.core import hardware
from alignment.core.artifacts import write_json
from alignment.core.errors import AlignmentError, ArtifactError, ConfigError, ModelError, StageError
from alignment.core.fingerprint import digest
from alignment.costs.devices import DEVICES, THIS
from alignment.costs.remedies import Choice, Way
from alignment.pipeline.backends import command, feasibility, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.pipeline.sources import bundled_model
from alignment.pipeline.sources.model_sources import resolve, resolve_shapes
from alignment.records.cost import ASKED, FILE, PROGRESS, RunCost, StageCost
from alignment.stages.registry import as_trained, kind_of

WAYS = ("full", "full without masters", "lora", "dora", "qlora", "prefix")
"""Ways of training, each a file of conf/adapter."""
SMALLEST_MICRO_BATCH = 512
"""Tokens of the smallest micro-batch that is proposed."""

Overrides = tuple[str, ...]


def choices(config: Any, *, divides_weights: bool) -> Iterator[Choice]:
    """Settings of a stage with which it needs less memory and trains the same weights, those that cost least first. A
    plan may refuse some of them. ``divides_weights``: its processes hold a share of the weights each."""
    halved = expected_tokens(config.optim.micro_batch_tokens) // 2
    sizes = tuple(size for times in range(halved.bit_length()) if (size := halved >> times) >= SMALLEST_MICRO_BATCH)
    if sizes:
        yield Choice(field="optim.micro_batch_tokens", values=sizes)
    if not getattr(config.optim, "activation_checkpointing", True):
        yield Choice(field="optim.activation_checkpointing", values=(True,))
    # An adapter's reference is its own base, and a policy in shares would be whole while it is its own reference.
    has_copy = config.adapter.kind is AdapterKind.full and not divides_weights
    if has_copy and not getattr(config, "precompute_reference", True):
        yield Choice(field="precompute_reference", values=(True,), drops_copy=True)


def ways_with_less(name: str, config: Any) -> Iterator[Overrides]:
    """Ways of training the stage ``name`` that need less and less memory, beginning with its own. A plan may refuse
    some of them."""
    kind = config.adapter.kind
    yield ()
    if kind is AdapterKind.full and config.adapter.master_weights:
        yield (f"stages.{name}.adapter.master_weights=false",)
    if kind is AdapterKind.full:
        yield (way_of_training(name, "lora"),)
    if kind in (AdapterKind.full, AdapterKind.lora, AdapterKind.dora):
        yield (way_of_training(name, "qlora"),)


def way_of_training(name: str, way: str) -> str:
    """The override that trains the stage ``name`` in one of ``WAYS``."""
    return f"adapter@stages.{name}.adapter={way.replace(' ', '_')}"


_FOLDER = ".cost"


def estimate(
    plan: Plan,
    *,
    device: str,
    memory: float,
    trade: bool = False,
    as_run: bool = False,
    announce: Callable[[str], None],
) -> RunCost:
    """The cost of each stage on ``device`` with ``memory`` bytes, remembered for ``known``. With ``as_run`` the longest
    micro-batch counts only where the stage would try it before its first step. Raises StageError: the process
    failed."""
    stages = estimated_stages(plan)
    _folder(plan).mkdir(parents=True, exist_ok=True)
    names = ", ".join(stage.name for stage in stages)
    announce(f"{names}: ten seconds or more for each stage and each way that is tried; nothing is trained")
    with tempfile.TemporaryDirectory(prefix="alignment-cost-") as scratch:
        folder = Path(scratch)
        asked = [_asked(plan, stage, folder, trade=trade, with_remedies=memory > 0) for stage in stages]
        write_json(folder / ASKED, asked)
        options = ["--device", device, "--memory", str(memory), *["--as-run"] * as_run]
        cost = _in_process(folder, options, announce=announce)
    for stage, own in zip(stages, cost.stages, strict=True):
        if not as_run and not (own.error and known(plan, stage, device=device)):
            remembered = RunCost(device=device, memory=memory, startup=cost.startup, stages=[own])
            remembered.write(_file(plan, stage, device))
    return cost


def estimated_stages(plan: Plan) -> list[PlannedStage]:
    """The stages that have a cost: those that a worker makes."""
    return [stage for stage in plan.stages if not kind_of(stage.config).in_driver]


def _asked(plan: Plan, stage: PlannedStage, folder: Path, *, trade: bool, with_remedies: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"file": _stage_file(plan, stage, folder), "cheaper": [], "ways": []}
    asked["processes"] = _launch_of(plan, stage).world_size
    trained = as_trained(stage.config)
    if trained is None:
        return asked
    for overrides in ways_with_less(stage.name, trained) if with_remedies else ():
        if (way := _way(plan, stage, overrides, folder)) is not None:
            asked["cheaper"].append(asdict(way))
    for name in WAYS if trade else ():
        overrides = (way_of_training(stage.name, name),)
        variant = _variant(plan, stage, overrides)
        adapter = None if variant is None or (other := as_trained(variant[1].config)) is None else other.adapter
        bare = adapter is not None and adapter.kind is AdapterKind.full and not adapter.master_weights
        if adapter is None or ("full without masters" if bare else adapter.kind.value) != name:
            variant = None  # a value from the command line keeps another adapter
        file = None if variant is None else _stage_file(*variant, folder, *overrides)
        asked["ways"].append({"name": name, "overrides": overrides, "file": file})
    return asked


def _way(plan: Plan, stage: PlannedStage, overrides: tuple[str, ...], folder: Path) -> Way | None:
    variant = _variant(plan, stage, overrides) if overrides else (plan, stage)
    if variant is None:
        return None
    other, planned = variant
    divides_weights = _launch_of(other, planned).sharding.of_weights
    offered = list(choices(planned.config, divides_weights=divides_weights))

    def allows(*taken: Choice) -> bool:
        settings = [choice.override(stage.name, len(choice.values)) for choice in taken]
        return _variant(other, planned, settings) is not None

    if offered and not allows(*offered):
        offered = [choice for choice in offered if allows(choice)]
    return Way(overrides=overrides, file=_stage_file(other, planned, folder, *overrides), choices=tuple(offered))


def _variant(plan: Plan, stage: PlannedStage, overrides: Sequence[str]) -> tuple[Plan, PlannedStage] | None:
    try:
        other = make_plan(plan.recipe, [*plan.overrides, *overrides], find=resolve_shapes)
    except AlignmentError:
        return None
    without_effect = {setting.where for setting in other.unread_settings}
    if without_effect & {override.partition("=")[0] for override in overrides}:
        return None
    return other, next(planned for planned in other.stages if planned.name == stage.name)


def _launch_of(plan: Plan, stage: PlannedStage) -> LaunchConfig:
    launch = replace(plan.config.launch, num_processes=max(1, plan.config.launch.num_processes))
    return feasibility.of_stage(launch, stage.config, num_devices=launch.num_processes)


def _stage_file(plan: Plan, stage: PlannedStage, folder: Path, *overrides: str) -> str:
    own = folder / "stages" / digest([stage.name, *overrides])[:16]
    return str(worker_protocol.write_stage_file(plan, stage, _launch_of(plan, stage), git_commit="", folder=own))


def known(plan: Plan, stage: PlannedStage, *, device: str) -> RunCost | None:
    """What an earlier call estimated for this one stage with these settings, if there was one."""
    try:
        cost = RunCost.read(_file(plan, stage, device))
    except (FileNotFoundError, ArtifactError):
        return None
    return cost if cost.stages else None


def pass_on(plan: Plan, stage: PlannedStage, folder: Path) -> None:
    """Copies what ``align plan --cost`` said of a stage on this machine to its folder of the run, for the report."""
    (folder / FILE).unlink(missing_ok=True)
    file = _file(plan, stage, THIS)
    if file.is_file():
        shutil.copyfile(file, folder / FILE)


def free_disk(plan: Plan) -> float:
    """Bytes that are free where the results of a plan go."""
    folder = plan.output
    while not folder.exists():
        folder = folder.parent
    return float(shutil.disk_usage(folder).free)


def _in_process(folder: Path, options: Sequence[str], *, announce: Callable[[str], None]) -> RunCost:
    argv = [sys.executable, "-m", "alignment.estimate", str(folder), *options]
    variables = command.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    variables |= {DEVICE: "cpu", **dict.fromkeys(hardware.VISIBLE, "")}  # shapes need no GPU
    log, progress = folder / "log.txt", folder / PROGRESS
    progress.touch()
    with progress.open(encoding="utf-8") as stream:

        def show_progress() -> None:
            for line in stream:
                announce(line.rstrip("\n"))

        program = Command(argv=tuple(argv), environment=variables)
        code = processes.execute(program, log=log, on_poll=show_progress, grace_seconds=1.0)
        show_progress()  # what it wrote after the last poll
    if code < 0:
        ended = f"the process that estimates the cost was ended by signal {-code}"
        raise StageError(ended, remedy="run it again; signal 9 often means that the machine ran out of memory")
    if code:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        raise StageError(f"the cost cannot be estimated: {' '.join(last)}", remedy="report this with the recipe")
    return RunCost.read(folder / FILE)


def _folder(plan: Plan) -> Path:
    return plan.output / "artifacts" / _FOLDER


def _file(plan: Plan, stage: PlannedStage, device: str) -> Path:
    machine = [platform.node(), hardware.count_cores(), __version__]
    key = [stage.fingerprint, to_plain(stage.config), to_plain(plan.config.launch), device, machine]
    return _folder(plan) / f"{digest(key)}.json"


_NOT_YET = "its settings are new since the last estimate; estimate again"


def is_wanted(*, cost: bool, device: str) -> bool:
    """Whether to estimate the cost: it was asked for, or a device was named."""
    return cost or device != THIS


def checked_plan(
    recipe: str, overrides: Sequence[str], *, cost: bool, trade: bool, device: str, verified: bool = False
) -> Plan:
    """A plan whose sizes fit together, and whose ``cost`` or ``trade`` on ``device`` can be estimated if it is wanted.
    Raises AlignmentError: a fault in the plan, or sizes that no machine can combine; ConfigError: ``device`` is not
    known, or is this machine and has a GPU."""
    if device not in (THIS, *DEVICES):
        raise ConfigError(f"no device '{device}'", where="--device", remedy=f"one of {', '.join((THIS, *DEVICES))}")
    if (cost or trade) and device == THIS and hardware.count_devices():
        message = "this machine has a GPU, and no times are known for it"
        remedy = f"name its type: --device {' | '.join(DEVICES)}"
        raise ConfigError(message, where="--cost" if cost else "--trade", remedy=remedy)
    plan = make_plan(recipe, overrides, find=resolve_shapes if cost or trade else resolve, verified=verified)
    refuse_sizes(plan)
    return plan


def estimated(plan: Plan, *, device: str, trade: bool, announce: Callable[[str], None]) -> RunCost:
    """The cost of a ``checked_plan``, which takes ten seconds or more for each stage. Raises ModelError: a model is not
    on this machine, so there is no configuration for its cost; StageError: the process that estimates failed."""
    for model in (plan.base, *plan.sources.values()):
        if not model.ready:
            message = f"{model.source} is not on this machine, but the estimate needs its configuration"
            remedy = f"`{bundled_model.fetch_command()}` fetches the bundled one"
            raise ModelError(message, where="--cost", remedy=remedy)
    memory = hardware.free_memory() if device == THIS else DEVICES[device].memory
    return estimate(plan, device=device, memory=memory, trade=trade, announce=announce)


def known_costs(plan: Plan) -> RunCost | None:
    """What was estimated before on this machine for stages with these settings; None if nothing was. A stage that was
    not estimated has an error. Of the remedies, only those are left that fit into the memory that is free now."""
    memory = hardware.free_memory()
    costs = [(stage, known(plan, stage, device=THIS)) for stage in estimated_stages(plan)]
    if all(cost is None for _, cost in costs):
        return None
    stages = [
        StageCost(stage=stage.name, kind=stage.config.kind, error=_NOT_YET) if cost is None else cost.stages[0]
        for stage, cost in costs
    ]
    return RunCost(
        device=THIS,
        memory=memory,
        startup=max(cost.startup for _, cost in costs if cost is not None),
        stages=[stage if stage.remedy_peak <= memory else replace(stage, remedy=[], remedy_peak=0) for stage in stages],
    )
