"""What a run needs from elsewhere: results, if a stage is run by itself, and models and data from outside."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from alignment.config.faults import suggestion
from alignment.core.errors import ConfigError
from alignment.pipeline.execute.display import Announce
from alignment.pipeline.plan import references
from alignment.pipeline.plan.plan import Plan, PlannedStage, made_again
from alignment.pipeline.sources import data_sources, model_sources
from alignment.stages.base import RunsOn
from alignment.stages.registry import kind_of


def with_inputs(plan: Plan, only: str, announce: Announce) -> Plan:
    """The plan, if the stage named ``only`` has all its inputs.

    A result is named after the commits of the models and data from a hub that it was made with. If a branch is not on
    this machine, its commit is unknown. So it is downloaded before a result counts as missing, if there are results of
    the same stages, or a store.

    Raises:
        ConfigError: there is no such stage, or a stage that makes one of its inputs has not been run.
        ModelError, DataError: something cannot be downloaded.
    """
    if only not in plan.config.stages:
        raise ConfigError(f"no stage '{only}' in this recipe; {suggestion(only, plan.config.stages)}", where="--stage")
    if _may_be_here(plan, _missing(plan, only)):
        names = _with_upstream(plan, only)
        plan = with_models(plan, announce, stages=[stage for stage in plan.stages if stage.name in names])
    if missing := _missing(plan, only):
        raise ConfigError(
            f"{only} needs the result of {', '.join(missing)}, which does not exist for these settings yet",
            where="--stage",
            remedy=f"first run: {_command_of(plan, missing[0])}; or leave out --stage to run all stages",
        )
    return plan


def _missing(plan: Plan, only: str) -> list[str]:
    """The inputs without a result; none if the stage itself has one."""
    reused = {stage.name for stage in plan.stages if not stage.has_to_run}
    if only in reused:
        return []
    return [name for name in references.inputs_of(only, plan.config.stages) if name not in {*reused, only}]


def _may_be_here(plan: Plan, names: list[str]) -> bool:
    """Whether there may be results of these stages under names that the plan does not know."""
    folders = [stage.artifact.parent.glob(f"{stage.name}-*") for stage in plan.stages if stage.name in names]
    return bool(names) and (plan.store is not None or any(map(any, folders)))


def _with_upstream(plan: Plan, only: str) -> list[str]:
    """The stage and all that its inputs depend on."""
    names = [only]
    for name in names:  # which grows meanwhile
        names += [other for other in references.inputs_of(name, plan.config.stages) if other not in names]
    return names


def _command_of(plan: Plan, stage: str) -> str:
    """The command that makes one stage with the settings of this plan."""
    verify = ["--verify"] if plan.verified else []
    return shlex.join(["align", "run", plan.recipe, *plan.overrides, "--stage", stage, *verify])


def not_reused(stages: Iterable[PlannedStage]) -> list[PlannedStage]:
    """The stages that have to run and need models or data."""
    waiting = [stage for stage in stages if stage.has_to_run]
    return [stage for stage in waiting if kind_of(stage.config).launch.runs_on is not RunsOn.driver]


def with_models(plan: Plan, announce: Announce, *, stages: Sequence[PlannedStage]) -> Plan:
    """The plan with every model and all data that these stages need on this machine.

    A download pins a hub's source to a commit, and its rows have not been checked yet, so the plan is made again. An
    adapter names its base model only once it is here.

    Raises:
        ModelError, DataError: something cannot be fetched.
    """
    if not fetch_missing([(plan, stages)], announce):
        return plan
    complete = made_again(plan)
    if not complete.base.ready:
        model_sources.fetch(complete.base, announce=announce)
        complete = made_again(plan)
    return complete


def fetch_missing(plans: Iterable[tuple[Plan, Sequence[PlannedStage]]], announce: Announce) -> bool:
    """Fetches, once each, what these stages of the plans need and is not on this machine; returns whether that was
    anything. Without stages, nothing is downloaded.

    Raises:
        ModelError, DataError: something cannot be fetched.
    """
    needed = [(plan, stages) for plan, stages in plans if stages]
    models = {
        model.source: model for plan, _ in needed for model in (plan.base, *plan.sources.values()) if not model.ready
    }
    data = {
        source.source: source
        for _, stages in needed
        for stage in stages
        for source in stage.hub_data
        if not source.complete
    }
    for model in models.values():
        model_sources.fetch(model, announce=announce)
    for source in data.values():
        data_sources.fetch(source, announce=announce)
    return bool(models or data)
