"""The learning curve's plan: arms that differ in nothing but how much they learn from."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.stages.sft.config import SftConfig


@pytest.fixture
def curve(overrides: list[str]) -> Plan:
    """The recipe on a model of its own and the shipped data."""
    return make_plan("learning_curve", _model(overrides))


def _model(overrides: list[str]) -> list[str]:
    return [override for override in overrides if override.startswith(("output=", "model."))]


def parts(plan: Plan) -> list[PlannedStage]:
    return [stage for stage in plan.stages if isinstance(stage.config, SftConfig)]


def test_every_part_starts_from_the_base_and_is_an_arm_of_the_evaluation(curve: Plan) -> None:
    names = [stage.name for stage in parts(curve)]
    assert [stage.name for stage in curve.stages] == [*names, "evaluate", "report"]
    assert {stage.inputs["init"].ref for stage in parts(curve)} == {"base"}
    assert list(curve.stages[-2].arms) == ["base", "base+prompt", *(f"stage:{name}" for name in names)]
    assert "reward" not in curve.stages[-2].inputs


def test_parts_differ_in_their_name_and_fraction_alone(curve: Plan) -> None:
    def without_amount(identity: dict[str, Any]) -> dict[str, Any]:
        config = identity["config"]
        return {**identity, "stage": "", "config": {**config, "data": {**config["data"], "fraction": 0}}}

    fractions = [stage.config.data.fraction for stage in parts(curve)]  # type: ignore[union-attr]
    assert fractions == [0.125, 0.25, 0.5, 1.0]
    first, *others = (without_amount(stage.identity) for stage in parts(curve))
    assert all(other == first for other in others)


def test_the_part_that_is_all_of_it_is_the_quickstart_s(curve: Plan, overrides: list[str]) -> None:
    quickstart = make_plan("quickstart", _model(overrides))
    assert parts(curve)[-1].fingerprint == parts(quickstart)[0].fingerprint
