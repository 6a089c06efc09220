"""How often the host waits for the device in an optimiser step: a new read of a value, such as ``.item()``, goes red.

Counts depend on the tiny models and their rows only where a line is called for each micro-batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from tests.simulated_device.conftest import Stages
from tests.simulated_device.events import Event
from tests.simulated_device.outcomes import Outcome, listing, waits
from tests.simulated_device.stages import ADAPTED, ADAPTERS, Cell

pytestmark = pytest.mark.xdist_group("simulated device")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Waits of a step: those that our lines ask for, and those of TRL, transformers, accelerate and PEFT.

    ``collected`` are our waits of an update's sampling and scoring in PPO, without those of decoding. With None the
    steps have different numbers of micro-batches, so only the cheapest is looked at.
    """

    own: int
    libraries: int
    collected: int | None = 0


BUDGETS = {
    "cpt": Budget(own=1, libraries=8),
    "sft": Budget(own=1, libraries=7),
    "reward": Budget(own=1, libraries=14),
    "dpo": Budget(own=1, libraries=36),
    "dpo_precomputed": Budget(own=1, libraries=36),
    "kto": Budget(own=1, libraries=20),
    "distil": Budget(own=1, libraries=7, collected=None),
    "distil_tokens": Budget(own=2, libraries=2, collected=None),
    "ppo": Budget(own=1, libraries=0, collected=3),
    "ppo_shared": Budget(own=1, libraries=0, collected=3),
    "ppo_guarded": Budget(own=2, libraries=0, collected=4),
    "grpo": Budget(own=1, libraries=0, collected=3),
}
DECODING = 1
"""Waits for each new token of a batch, whatever the number of rows."""
_GENERATE = "alignment/models/forward/generate.py"


def _is_of_decoding(event: Event) -> bool:
    return bool(event.lines) and event.lines[0].startswith(_GENERATE)


def _split(outcome: Outcome) -> tuple[Counter[Event], Counter[Event]]:
    """A step, and what an update collects before its first step. Events of decoding are left out."""
    without = [Counter({event: n for event, n in step.items() if not _is_of_decoding(event)}) for step in outcome.steps]
    cheapest = min(without, key=lambda step: (waits(step, own=True), waits(step, own=False)))
    return cheapest, max(without, key=lambda step: waits(step, own=True)) - cheapest


@pytest.mark.parametrize("stage", sorted(BUDGETS))
def test_a_step_waits_no_more_often_than_its_budget_allows(stages: Stages, stage: str) -> None:
    outcome, budget = stages.outcome(Cell(stage=stage)), BUDGETS[stage]
    assert outcome.error == ""
    step, collected = _split(outcome)
    assert waits(step, own=True) == budget.own, listing(step)
    assert waits(step, own=False) <= budget.libraries, listing(step)
    if budget.collected is not None:
        assert waits(collected, own=True) == budget.collected, listing(collected)


@pytest.mark.parametrize("stage", ["ppo", "grpo", "sample", "evaluate"])
def test_decoding_waits_once_for_a_token(stages: Stages, stage: str) -> None:
    outcome = stages.outcome(Cell(stage=stage))
    decoding = Counter({event: count for event, count in outcome.events.items() if _is_of_decoding(event)})
    assert outcome.decoded > 0
    assert waits(decoding, own=True) == DECODING * outcome.decoded, listing(decoding)


@pytest.mark.parametrize("stage", ADAPTED)
@pytest.mark.parametrize("adapter", [adapter for adapter in ADAPTERS if adapter != "lora"])
def test_no_adapter_costs_a_wait(stages: Stages, stage: str, adapter: str) -> None:
    plain, other = (_split(stages.outcome(Cell(stage=stage, adapter=kind))) for kind in ("lora", adapter))
    assert [waits(part, own=True) for part in other] == [waits(part, own=True) for part in plain], listing(other[0])
