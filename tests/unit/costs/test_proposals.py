"""Proposals for stages that do not fit, by what their own code takes with and without each setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.model import AdapterConfig, AdapterKind
from alignment.costs.remedies import Way, with_remedy, with_settings
from alignment.costs.shadows import Operation
from alignment.estimate import Timer, cost_of
from alignment.job import StageSpec
from alignment.pipeline.execute.estimates import choices
from alignment.records.cost import StageCost
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.shared import reference
from tests.in_memory import without_collections
from tests.unit.costs.test_ways import as_adapter, spec_of

FULL, LORA = (AdapterConfig(kind=kind) for kind in (AdapterKind.full, AdapterKind.lora))
REFERENCE = "reference log-probabilities"
SIZE = "optim.micro_batch_tokens"
AS_LORA = "adapter@stages.dpo.adapter=lora"


class Untimed(Timer):
    """A device on which no operation may be timed."""

    def _measured(self, operation: Operation, bytes_between: float) -> float:
        raise AssertionError("an operation was timed")


def ways_of(spec: StageSpec) -> list[Way]:
    """Training all weights and LoRA, without sizes of micro-batches, to save estimates."""
    own: tuple[str, ...] = ()
    ways = []
    for overrides, adapter in ((own, FULL), ((AS_LORA,), LORA)):
        offered = choices(as_adapter(spec, adapter).config, divides_weights=False)
        others = tuple(choice for choice in offered if choice.field != SIZE)
        ways.append(Way(overrides=overrides, file=adapter.kind.value, choices=others))
    return ways


def combinations(way: Way) -> list[tuple[int, ...]]:
    """Every level of every choice."""
    levels: list[tuple[int, ...]] = [()]
    for choice in way.choices:
        levels = [(*before, level) for before in levels for level in range(len(choice.values) + 1)]
    return levels


@pytest.fixture
def stage(tmp_path: Path) -> StageSpec:
    return as_adapter(spec_of(tmp_path, DpoConfig, tokens=512), FULL)


Estimate = Callable[[Way, Mapping[str, Any]], StageCost]


@pytest.fixture
def estimate(stage: StageSpec) -> Estimate:
    """Estimates each combination once."""
    costs: dict[Any, StageCost] = {}

    def cost(way: Way, settings: Mapping[str, Any]) -> StageCost:
        key = (way.file, *sorted(settings.items()))
        if key not in costs:
            spec = as_adapter(stage, FULL if way.file == FULL.kind.value else LORA)
            changed = replace(spec, config=with_settings(spec.config, settings))
            with without_collections():
                costs[key] = cost_of(changed, Timer("l4").without_times(), publishes=False)
            assert costs[key].error == ""
        return costs[key]

    return cost


@pytest.mark.filterwarnings("ignore:Adapter name 'ref' should not be contained:UserWarning")  # TRL's own name
def test_without_any_setting_of_a_proposal_the_stage_does_not_fit(stage: StageSpec, estimate: Estimate) -> None:
    ways = ways_of(stage)
    own, lora = ways
    peaks = {
        frozenset(way.all_overrides("dpo", levels)): estimate(way, way.settings(levels)).peak
        for way in ways
        for levels in combinations(way)
    }
    assert len(peaks) == 6
    unchanged, most = estimate(own, {}), peaks[frozenset(lora.all_overrides("dpo", (1,)))]
    proposals = set()
    for memory in sorted({*peaks.values(), *(peak - 1 for peak in peaks.values())}):
        cost = with_remedy(unchanged, ways, memory, estimate)
        remedy = frozenset(cost.remedy)
        assert remedy or not most <= memory < unchanged.peak
        if remedy:
            assert cost.remedy_peak == peaks[remedy] <= memory
            proposals.add(remedy)
        for setting in remedy:
            assert peaks[remedy - {setting}] > memory, f"{setting} is not needed for {memory} bytes"
    assert {len(remedy) for remedy in proposals} == {1, 2}
    for setting in ("stages.dpo.precompute_reference=true", AS_LORA):
        assert any(setting in remedy for remedy in proposals)


@pytest.mark.parametrize("kind", [DpoConfig, KtoConfig])
def test_a_reference_that_is_computed_beforehand_leaves_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    """Nor does it leave a file, which the next estimate would read instead of computing it."""

    def read(_: object) -> str:
        raise AssertionError("an estimate reads no weights")

    monkeypatch.setattr(reference, "weights_sha256", read)
    spec = as_adapter(spec_of(tmp_path, kind), FULL)
    beforehand = replace(spec, config=replace(spec.config, precompute_reference=True))
    held, first, second = (cost_of(each, Timer("l4"), publishes=False) for each in (spec, beforehand, beforehand))
    assert held.error == first.error == ""
    # Not all of the copy: norms are too small to be counted, and hidden states of the pass beforehand may be left.
    assert held.peak - first.peak > held.weights / 2
    assert REFERENCE not in held.phases
    assert first.phases[REFERENCE].flop == second.phases[REFERENCE].flop > 0
    assert not list(tmp_path.rglob("reference-*"))


def test_for_memory_alone_nothing_is_timed(tmp_path: Path) -> None:
    spec = as_adapter(spec_of(tmp_path, DpoConfig), LORA)
    cost = cost_of(spec, Untimed("this").without_times(), publishes=False)
    assert cost.error == ""
    assert cost.peak > 0
    assert cost.phases["saving"].seconds == 0
    with pytest.raises(AssertionError, match="an operation was timed"):
        cost_of(spec, Untimed("this"), publishes=False)
