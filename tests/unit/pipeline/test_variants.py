"""What is tried where a stage does not fit, and what a trade compares."""

from __future__ import annotations

import pytest

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.data import DataConfig
from alignment.config.micro_batch import Automatic
from alignment.config.optim import OptimConfig
from alignment.core.resources import shipped
from alignment.costs.remedies import Choice
from alignment.pipeline.execute.estimates import WAYS, choices, way_of_training, ways_with_less
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.sft.config import SftConfig

SMALLER = Choice(field="optim.micro_batch_tokens", values=(1024, 512))
AGAIN = Choice(field="optim.activation_checkpointing", values=(True,))
BEFOREHAND = Choice(field="precompute_reference", values=(True,), drops_copy=True)
OWN: tuple[str, ...] = ()


def config(kind: AdapterKind, *, checkpoints: bool = False) -> SftConfig:
    optim = OptimConfig(lr=1e-4, micro_batch_tokens=2048, activation_checkpointing=checkpoints)
    return SftConfig(adapter=AdapterConfig(kind=kind), data=DataConfig(source="path:rows.jsonl"), optim=optim)


def dpo(kind: AdapterKind, *, precomputed: bool = False) -> DpoConfig:
    return DpoConfig(adapter=AdapterConfig(kind=kind), precompute_reference=precomputed)


def test_first_what_takes_little_time_then_what_takes_more() -> None:
    assert list(choices(config(AdapterKind.full), divides_weights=False)) == [SMALLER, AGAIN]
    assert [SMALLER.override("sft", level) for level in (1, 2)] == [
        "stages.sft.optim.micro_batch_tokens=1024",
        "stages.sft.optim.micro_batch_tokens=512",
    ]
    assert AGAIN.override("sft", 1) == "stages.sft.optim.activation_checkpointing=true"


def test_a_size_that_is_not_chosen_yet_counts_as_the_default() -> None:
    automatic = config(AdapterKind.qlora)
    automatic.optim.micro_batch_tokens = Automatic.auto
    assert list(choices(automatic, divides_weights=False)) == [SMALLER, AGAIN]


@pytest.mark.parametrize(("tokens", "sizes"), [(5000, (2500, 1250, 625)), (1024, (512,)), (1023, ())])
def test_sizes_are_halved_down_to_the_smallest(tokens: int, sizes: tuple[int, ...]) -> None:
    small = config(AdapterKind.lora, checkpoints=True)
    small.optim.micro_batch_tokens = tokens
    assert [choice.values for choice in choices(small, divides_weights=False)] == [sizes] * bool(sizes)


def test_nothing_is_tried_that_a_stage_has() -> None:
    assert list(choices(config(AdapterKind.full, checkpoints=True), divides_weights=False)) == [SMALLER]
    assert list(choices(dpo(AdapterKind.full, precomputed=True), divides_weights=False)) == [SMALLER, AGAIN]


@pytest.mark.parametrize("kind", list(AdapterKind))
def test_a_reference_is_computed_beforehand_where_it_is_a_copy(kind: AdapterKind) -> None:
    """With an adapter the base is its own reference, and a policy in shares would be whole until it is computed."""
    expected = [SMALLER, AGAIN, BEFOREHAND] if kind is AdapterKind.full else [SMALLER, AGAIN]
    assert list(choices(dpo(kind), divides_weights=False)) == expected
    assert list(choices(dpo(kind), divides_weights=True)) == [SMALLER, AGAIN]


def test_other_weights_are_trained_last() -> None:
    lora, qlora = (("adapter@stages.sft.adapter=" + name,) for name in ("lora", "qlora"))
    bare = ("stages.sft.adapter.master_weights=false",)
    without = config(AdapterKind.full)
    without.adapter.master_weights = False
    assert list(ways_with_less("sft", config(AdapterKind.full))) == [OWN, bare, lora, qlora]
    assert list(ways_with_less("sft", without)) == [OWN, lora, qlora]
    assert list(ways_with_less("sft", config(AdapterKind.lora))) == [OWN, qlora]
    assert list(ways_with_less("sft", config(AdapterKind.qlora))) == [OWN]


def test_every_way_is_a_group_that_there_is() -> None:
    groups = {path.stem for path in (shipped("conf") / "adapter").glob("*.yaml")}
    assert set(WAYS.values()) == groups
    assert way_of_training("dpo", "full without masters") == "adapter@stages.dpo.adapter=full_without_masters"
