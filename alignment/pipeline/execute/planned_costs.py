"""What a plan would cost, estimated now or earlier: ``align plan --cost``, and ``cost=True`` in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from alignment.core import hardware
from alignment.core.errors import ConfigError, ModelError
from alignment.costs.devices import DEVICES, THIS
from alignment.pipeline.backends.feasibility import refuse_sizes
from alignment.pipeline.execute import estimates
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.sources import bundled_model
from alignment.pipeline.sources.model_sources import resolve, resolve_shapes
from alignment.records.cost import RunCost, StageCost

_NOT_YET = "its settings are new since the last estimate; estimate again"


def is_wanted(*, cost: bool, device: str) -> bool:
    """Whether to estimate the cost: it was asked for, or a device was named."""
    return cost or device != THIS


def checked_plan(
    recipe: str, overrides: Sequence[str], *, cost: bool, trade: bool, device: str, verified: bool = False
) -> Plan:
    """A plan whose sizes fit together, and whose ``cost`` or ``trade`` on ``device`` can be estimated if it is wanted.

    Raises:
        AlignmentError: a fault in the plan, or sizes that no machine can combine.
        ConfigError: ``device`` is not known, or is this machine and has a GPU.
    """
    if device not in (THIS, *DEVICES):
        raise ConfigError(f"no device '{device}'", where="--device", remedy=f"one of {', '.join((THIS, *DEVICES))}")
    if (cost or trade) and device == THIS and hardware.count_devices():
        raise ConfigError(
            "this machine has a GPU, and no times are known for it",
            where="--cost" if cost else "--trade",
            remedy=f"name its type: --device {' | '.join(DEVICES)}",
        )
    plan = make_plan(recipe, overrides, find=resolve_shapes if cost or trade else resolve, verified=verified)
    refuse_sizes(plan)
    return plan


def estimated(plan: Plan, *, device: str, trade: bool, announce: Callable[[str], None]) -> RunCost:
    """The cost of a ``checked_plan``, which takes half a minute or more for each stage.

    Raises:
        ModelError: a model is not on this machine, so there is no configuration for its cost.
        StageError: the process that estimates failed.
    """
    for model in (plan.base, *plan.sources.values()):
        if not model.ready:
            raise ModelError(
                f"{model.source} is not on this machine, but the estimate needs its configuration",
                where="--cost",
                remedy=f"`{bundled_model.fetch_command()}` fetches the bundled one",
            )
    memory = hardware.free_memory() if device == THIS else DEVICES[device].memory
    return estimates.estimate(plan, device=device, memory=memory, trade=trade, announce=announce)


def known(plan: Plan) -> RunCost | None:
    """What was estimated before on this machine for stages with these settings; None if nothing was.

    A stage that was not estimated has an error. Of the remedies, only those are left that fit into the memory that is
    free now.
    """
    memory = hardware.free_memory()
    costs = [(stage, estimates.known(plan, stage, device=THIS)) for stage in estimates.estimated_stages(plan)]
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
