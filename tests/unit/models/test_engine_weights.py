"""What an engine gets, read by transformers and PEFT alone, is the policy: base, adapters below it, and its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignment.config.adapter import CONTINUE, AdapterConfig, Chain
from alignment.config.critic import Critic
from alignment.models.assembly.engine_weights import write_adapter, write_base, write_model
from alignment.models.assembly.load import lineage
from alignment.models.forward.answers import unwrapped
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.stages.ppo.trainer_setup import roles_of
from alignment.training.context import StageContext
from tests.chained import FULL, LORA, QLORA, Chained, config_of
from tests.device import need_bitsandbytes
from tests.oracles.close import close
from tests.tiny import liven

IDS = torch.tensor([[5, 9, 40, 7, 120, 33, 8]])
STACK, CONTINUED = AdapterConfig(rank=4, chain=Chain.stack), AdapterConfig(rank=4, chain=CONTINUE)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """``[tokens, vocabulary]``."""
    return model(IDS).logits[0]


def as_an_engine_reads(base: Path, adapter: Path | None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    return logits(model if adapter is None else PeftModel.from_pretrained(model, str(adapter)))


@pytest.mark.parametrize(
    ("before", "adapter", "is_base"),
    [(None, LORA, True), (LORA, STACK, False), (LORA, CONTINUED, True), (None, QLORA, False), (LORA, QLORA, False)],
    ids=["LoRA", "LoRA on LoRA", "LoRA continued", "QLoRA", "QLoRA on LoRA"],
)
def test_base_and_adapter_are_the_policy(
    tmp_path: Path, before: AdapterConfig | None, adapter: AdapterConfig, is_base: bool
) -> None:
    if adapter is QLORA:
        need_bitsandbytes()
    chained = Chained(tmp_path)
    if before is not None:
        chained.run("sft", before)
    init = "base" if before is None else "sft"
    config = config_of("ppo", adapter, reward=None, advantage=Advantage.rloo, critic=Critic.none)
    assert isinstance(config, PpoConfig)
    spec = chained.spec("ppo", adapter, init=init, config=config)
    context = StageContext(spec=spec, rank=0, world_size=1)
    start = lineage(spec, spec.inputs["init"])
    policy = roles_of(config, context, start, None).policy
    liven(policy)
    base = write_base(start, adapter, torch.float32, tmp_path / "engine")
    assert (base == chained.base) is is_base
    own = write_adapter(policy, None, tmp_path / "own")
    read = as_an_engine_reads(base, own)
    close(read, logits(unwrapped(policy)), atol=1e-5, rtol=1e-4)
    assert float((read - as_an_engine_reads(base, None)).abs().max()) > 1e-2, "the adapter should do something"


def test_whole_weights_are_the_policy_and_a_later_version_replaces_both_matrices(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    spec = chained.spec("ppo", FULL, config=config_of("ppo", FULL, reward=None))
    start = lineage(spec, spec.inputs["init"])
    base = write_base(start, FULL, torch.float32, tmp_path / "engine")
    model = AutoModelForCausalLM.from_pretrained(str(chained.base), dtype=torch.float32).eval()
    close(as_an_engine_reads(base, None), logits(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    later = write_model(
        model, dict(model.named_parameters(remove_duplicate=False)), torch.float32, tmp_path / "policy-1"
    )
    close(as_an_engine_reads(later, None), logits(model), atol=1e-5)


def test_whole_weights_are_written_as_the_stage_computes(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    spec = chained.spec("ppo", FULL, config=config_of("ppo", FULL, reward=None))
    base = write_base(lineage(spec, spec.inputs["init"]), FULL, torch.bfloat16, tmp_path / "engine")
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
