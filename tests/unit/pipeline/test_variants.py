"""What is proposed where a stage does not fit, and what a trade compares."""

from __future__ import annotations

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.config.data import DataConfig
from alignment.config.micro_batch import Automatic
from alignment.config.optim import OptimConfig
from alignment.core.resources import shipped
from alignment.pipeline.plan.variants import WAYS, cheaper, way_of_training
from alignment.stages.sft.config import SftConfig

LESS = "stages.sft.optim.micro_batch_tokens=512"
AGAIN = "stages.sft.optim.activation_checkpointing=true"


def config(kind: AdapterKind, *, checkpoints: bool = False) -> SftConfig:
    optim = OptimConfig(lr=1e-4, micro_batch_tokens=2048, activation_checkpointing=checkpoints)
    return SftConfig(adapter=AdapterConfig(kind=kind), data=DataConfig(source="path:rows.jsonl"), optim=optim)


def test_first_what_changes_no_result_then_what_takes_time_then_other_weights() -> None:
    assert list(cheaper("sft", config(AdapterKind.full))) == [
        ("stages.sft.optim.micro_batch_tokens=1024",),
        (LESS,),
        (LESS, AGAIN),
        (LESS, AGAIN, "stages.sft.adapter.master_weights=false"),
        (LESS, AGAIN, "adapter@stages.sft.adapter=lora"),
        (LESS, AGAIN, "adapter@stages.sft.adapter=qlora"),
    ]


def test_a_size_that_is_not_chosen_yet_counts_as_the_default() -> None:
    automatic = config(AdapterKind.qlora, checkpoints=True)
    automatic.optim.micro_batch_tokens = Automatic.auto
    assert list(cheaper("sft", automatic)) == list(cheaper("sft", config(AdapterKind.qlora, checkpoints=True)))


def test_nothing_is_proposed_that_a_stage_has() -> None:
    assert list(cheaper("sft", config(AdapterKind.qlora, checkpoints=True))) == [
        ("stages.sft.optim.micro_batch_tokens=1024",),
        (LESS,),
    ]


def test_every_way_is_a_group_that_there_is() -> None:
    groups = {path.stem for path in (shipped("conf") / "adapter").glob("*.yaml")}
    assert set(WAYS.values()) == groups
    assert way_of_training("dpo", "full without masters") == "adapter@stages.dpo.adapter=full_without_masters"
