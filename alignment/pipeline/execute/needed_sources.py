"""Models and data from outside that stages need on this machine, which are fetched before the first stage starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alignment.pipeline.execute.display import Announce
from alignment.pipeline.plan.plan import Plan, PlannedStage, made_again
from alignment.pipeline.sources import data_sources, model_sources
from alignment.stages.base import RunsOn
from alignment.stages.registry import kind_of


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
