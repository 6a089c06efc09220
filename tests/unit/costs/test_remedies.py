"""Proposals for stages that do not fit: no setting that is not needed, those that cost least, in few estimates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.data import DataConfig
from alignment.config.model import AdapterConfig, AdapterKind
from alignment.config.optim import OptimConfig
from alignment.costs.remedies import Choice, Levels, Way, cheapest, with_remedy, with_settings
from alignment.costs.shadows import Operation
from alignment.estimate import Timer, cost_of
from alignment.records.cost import PhaseCost, StageCost
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.kto.kind import KtoConfig
from alignment.stages.shared import reference
from tests.unit.costs.test_ways import as_adapter, spec_of

DEPTHS = (2, 1, 1)
TOKENS = Choice(field="optim.micro_batch_tokens", values=(1024, 512))
AGAIN = Choice(field="optim.activation_checkpointing", values=(True,))
BEFOREHAND = Choice(field="precompute_reference", values=(True,), drops_copy=True)
OWN = Way(overrides=(), file="full", choices=(TOKENS, AGAIN, BEFOREHAND))
BARE = Way(overrides=("stages.dpo.adapter.master_weights=false",), file="bare", choices=OWN.choices)
LORA = Way(overrides=("adapter@stages.dpo.adapter=lora",), file="lora", choices=(TOKENS, AGAIN))
QLORA = Way(overrides=("adapter@stages.dpo.adapter=qlora",), file="qlora", choices=(TOKENS, AGAIN))
WAYS = (OWN, BARE, LORA, QLORA)

SHORT = {
    "M1024": TOKENS.override("dpo", 1),
    "M512": TOKENS.override("dpo", 2),
    "C": AGAIN.override("dpo", 1),
    "P": BEFOREHAND.override("dpo", 1),
    "BARE": BARE.overrides[0],
    "LORA": LORA.overrides[0],
}

STATES = {"full": (40, 40, 80), "bare": (20, 20, 40), "lora": (20, 1, 2), "qlora": (6, 1, 2)}
"""Weights, gradients and moments of each way; its copy of the weights takes 20 more."""


@dataclass
class Stage:
    fails: tuple[str, ...] = ()
    estimated: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def estimate(self, way: Way, settings: Mapping[str, Any]) -> StageCost:
        self.estimated.append((way.file, dict(settings)))
        if way.file in self.fails:
            return StageCost(stage="dpo", kind="dpo", error="it cannot")
        weights, gradients, moments = STATES[way.file]
        if BEFOREHAND in way.choices and not settings.get("precompute_reference"):
            weights += 20
        activations = settings.get("optim.micro_batch_tokens", 2048) // 32
        if settings.get("optim.activation_checkpointing"):
            activations //= 8
        parts = {"weights": weights, "gradients": gradients, "optimiser": moments, "activations": activations}
        phase = PhaseCost(peak=sum(parts.values()), parts=parts)
        return StageCost(stage="dpo", kind="dpo", phases={"training": phase}, fixed=3)

    def remedied(self, memory: float) -> StageCost:
        own = self.estimate(OWN, {})
        self.estimated.clear()
        return with_remedy(own, WAYS, memory, self.estimate)


EVERY = list(itertools.product(*(range(depth + 1) for depth in DEPTHS)))


def every_set() -> Iterator[set[Levels]]:
    for chosen in itertools.product((False, True), repeat=len(EVERY)):
        yield set(itertools.compress(EVERY, chosen))


def is_freeing(fitting: set[Levels]) -> bool:
    return all(other in fitting for levels in fitting for other in EVERY if all(map(int.__ge__, other, levels)))


def chosen_of(fitting: set[Levels]) -> tuple[Levels | None, int]:
    asked: list[Levels] = []

    def fits(levels: Levels) -> bool:
        asked.append(levels)
        return levels in fitting

    chosen = cheapest(DEPTHS, fits)
    assert len(asked) == len(set(asked)), "asked twice"
    return chosen, len(asked)


def test_of_all_levels_that_fit_those_that_cost_least_are_chosen() -> None:
    """A later choice costs more than all before it. At most nine of twelve combinations are asked about."""
    freeing = [fitting for fitting in every_set() if is_freeing(fitting)]
    assert len(freeing) == 50
    for fitting in freeing:
        chosen, asked = chosen_of(fitting)
        assert chosen == min(fitting, key=lambda levels: levels[::-1], default=None)
        assert asked <= 9


@pytest.mark.parametrize(
    ("memory", "remedy"),
    [
        (215, "M1024"),
        (200, "M512"),
        (188, "M1024 C"),
        (184, "M512 P"),
        (165, "M512 C P"),
        (164, "M1024 BARE"),
        (84, "M1024 LORA"),
        (11, ""),
    ],
)
def test_settings_that_cost_least_come_first(memory: float, remedy: str) -> None:
    """What makes the stage slower before what changes its result, and the largest micro-batch that fits."""
    assert Stage().remedied(memory).remedy == [SHORT[name] for name in remedy.split()]


def test_a_way_that_a_later_one_makes_needless_is_left_out() -> None:
    """Smaller micro-batches may take memory, which hides that checkpointing alone is enough."""
    peaks = {("full", 0): 100, ("full", 1): 80, ("lora", 0): 95, ("lora", 1): 70}

    def estimate(way: Way, settings: Mapping[str, Any]) -> StageCost:
        peak = peaks[way.file, int(AGAIN.field in settings)] + (10 if TOKENS.field in settings else 0)
        return StageCost(stage="dpo", kind="dpo", phases={"training": PhaseCost(peak=peak)})

    ways = [replace(way, choices=(TOKENS, AGAIN)) for way in (OWN, LORA)]
    cost = with_remedy(estimate(OWN, {}), ways, 85, estimate)
    assert (cost.remedy, cost.remedy_peak) == ([SHORT["C"]], 80)


def test_settings_inside_others_are_replaced_and_no_others() -> None:
    config = DpoConfig(
        adapter=AdapterConfig(), data=DataConfig(source="path:rows.jsonl"), optim=OptimConfig(lr=1e-4, batch_size=3)
    )
    changed = with_settings(config, {"optim.micro_batch_tokens": 7, "precompute_reference": True})
    assert (changed.optim.micro_batch_tokens, changed.optim.batch_size, changed.precompute_reference) == (7, 3, True)
    assert (config.optim.micro_batch_tokens, config.precompute_reference) == (2048, False)


FULL, PROPOSALS_LORA = (AdapterConfig(kind=kind) for kind in (AdapterKind.full, AdapterKind.lora))
REFERENCE = "reference log-probabilities"


class Untimed(Timer):
    def _measured(self, operations: Sequence[tuple[Operation, float]]) -> list[float]:
        raise AssertionError("an operation was timed")


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
    spec = as_adapter(spec_of(tmp_path, DpoConfig), PROPOSALS_LORA)
    cost = cost_of(spec, Untimed("this").without_times(), publishes=False)
    assert cost.error == ""
    assert cost.peak > 0
    assert cost.phases["saving"].seconds == 0
    with pytest.raises(AssertionError, match="an operation was timed"):
        cost_of(spec, Untimed("this"), publishes=False)


def test_what_cannot_be_estimated_is_not_proposed() -> None:
    stage = Stage(fails=("bare", "lora"))
    assert stage.remedied(82).remedy == list(QLORA.overrides)
    assert stage.estimated == [("bare", {}), ("lora", {}), ("qlora", {})]


def peak_with(overrides: list[str]) -> int:
    way = next((way for way in WAYS if way.overrides and set(way.overrides) <= set(overrides)), OWN)
    settings = {
        choice.field: value
        for choice in way.choices
        for level, value in enumerate(choice.values, start=1)
        if choice.override("dpo", level) in overrides
    }
    return Stage().estimate(way, settings).peak


def test_every_setting_of_a_proposal_is_needed() -> None:
    own = Stage().estimate(OWN, {})
    lengths = set()
    for memory in range(1, own.peak):
        stage = Stage()
        cost = stage.remedied(memory)
        if not cost.remedy:
            assert memory < peak_with([*QLORA.all_overrides("dpo", (2, 1))])
            continue
        assert cost.remedy_peak == peak_with(cost.remedy) <= memory
        for left_out in cost.remedy:
            assert peak_with([override for override in cost.remedy if override != left_out]) > memory
        assert len(stage.estimated) <= 9, "of 36 combinations"
        lengths.add(len(cost.remedy))
    assert lengths == {1, 2, 3, 4}
