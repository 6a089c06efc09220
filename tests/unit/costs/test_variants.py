"""What is proposed where a stage does not fit, and what a trade compares."""

from __future__ import annotations

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.data import DataConfig
from alignment.config.optim import Moments, OptimConfig
from alignment.costs.variants import cheaper, ways_of_training
from alignment.stages.sft.config import SftConfig


def config(kind: AdapterKind, **optim: object) -> SftConfig:
    settings = OptimConfig(lr=1e-4, micro_batch_tokens=2048, **optim)  # type: ignore[arg-type]
    return SftConfig(adapter=AdapterConfig(kind=kind), data=DataConfig(source="path:rows.jsonl"), optim=settings)


def test_first_what_changes_no_result_then_what_takes_time_then_other_weights() -> None:
    variants = list(cheaper(config(AdapterKind.full)))
    assert [variant.overrides for variant in variants] == [
        ("optim.micro_batch_tokens=1024",),
        ("optim.micro_batch_tokens=512",),
        ("optim.micro_batch_tokens=512", "optim.activation_checkpointing=true"),
        ("optim.micro_batch_tokens=512", "optim.activation_checkpointing=true", "adapter.master_weights=false"),
        (
            "optim.micro_batch_tokens=512",
            "optim.activation_checkpointing=true",
            "adapter.kind=lora",
            "adapter.master_weights=true",
        ),
        (
            "optim.micro_batch_tokens=512",
            "optim.activation_checkpointing=true",
            "adapter.master_weights=true",
            "adapter.kind=qlora",
        ),
    ]
    last = variants[-1].config
    assert (last.optim.micro_batch_tokens, last.optim.activation_checkpointing) == (512, True)
    assert (last.adapter.kind, last.adapter.master_weights) == (AdapterKind.qlora, True)


def test_nothing_is_proposed_that_a_stage_has() -> None:
    variants = list(cheaper(config(AdapterKind.qlora, activation_checkpointing=True)))
    assert [variant.overrides for variant in variants] == [
        ("optim.micro_batch_tokens=1024",),
        ("optim.micro_batch_tokens=512",),
    ]


def test_a_trade_has_every_way_of_training_with_what_makes_it() -> None:
    ways = dict(ways_of_training(config(AdapterKind.lora, moments=Moments.eight_bit)))
    assert list(ways) == ["full", "full without masters", "lora", "dora", "qlora", "prefix"]
    assert ways["full without masters"].overrides == ("adapter.kind=full", "adapter.master_weights=false")
    assert ways["qlora"].overrides == ("adapter.kind=qlora",)
    assert {way.config.optim.moments for way in ways.values()} == {Moments.full}
    assert [way.config.adapter.kind.value for way in ways.values()] == [
        "full",
        "full",
        "lora",
        "dora",
        "qlora",
        "prefix",
    ]
