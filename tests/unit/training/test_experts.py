"""Mixture-of-experts models learn in every stage that TRL trains, in TRL's forward (granitemoe) and in the flat one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from alignment.config.adapter import AdapterConfig, AdapterKind
from alignment.models.assembly.load import Lineage, load_policy
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import generate
from alignment.records.step_log import MetricsLog
from alignment.training.context import StageContext
from tests.tiny import save_tiny_model, tiny_spec
from tests.unit.models.conftest import PROMPTS, greedy, twin
from tests.unit.training.test_micro_batches import OPTIM, PAIRS, STAGES, trained_weights, write_rows

FULL = AdapterConfig(kind=AdapterKind.full)
"""Trains the routers too."""
KINDS = ("sft", "sft packed", "dpo", "kto")
EXPERTS = pytest.mark.parametrize("architecture", ["mixtral", "granitemoe"])


def trained(folder: Path, kind: str, architecture: str, *, micro_batch_tokens: int, **changes: Any) -> StageContext:
    """A stage that has trained all weights of such a model; ``changes`` replace settings of it."""
    config, run = STAGES[kind]
    folder.mkdir()
    save_tiny_model(folder / "base", architecture=architecture, router_aux_loss_coef=0.5, **changes)
    write_rows(folder / "data.jsonl", pairs=kind in PAIRS)
    config = replace(config, adapter=FULL, optim=replace(OPTIM, micro_batch_tokens=micro_batch_tokens))
    context = StageContext(spec=tiny_spec(folder, config), rank=0, world_size=1)
    torch.manual_seed(0)
    run(config, context)
    return context


@EXPERTS
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_experts_learns_the_same_in_micro_batches_of_any_size(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    """The loss that balances experts would be another one in each micro-batch, so it is left out."""
    weights = []
    for limit in (10_000, 1):
        context = trained(tmp_path / str(limit), kind, architecture, micro_batch_tokens=limit)
        assert "aux_loss" not in MetricsLog(context.content / "metrics.jsonl").last()
        weights.append(trained_weights(context.content))
    assert float((weights[1] - weights[0]).norm() / weights[0].norm()) < 1e-5


@EXPERTS
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("output_router_logits", [False, True])
def test_a_model_with_experts_keeps_its_coefficient(
    tmp_path: Path, kind: str, architecture: str, output_router_logits: bool
) -> None:
    changes = {"output_router_logits": output_router_logits}
    context = trained(tmp_path / "run", kind, architecture, micro_batch_tokens=10_000, **changes)
    saved = AutoConfig.from_pretrained(context.content / "model")
    assert (saved.router_aux_loss_coef, saved.output_router_logits) == (0.5, False)


@EXPERTS
def test_a_base_that_asks_for_an_auxiliary_loss_answers_as_without_it(tmp_path: Path, architecture: str) -> None:
    save_tiny_model(tmp_path / "base", architecture=architecture, output_router_logits=True)
    base = load_policy(Lineage(source="path:experts", base=tmp_path / "base", adapters=()), torch.float32)
    reference = twin(base)
    use_flat_attention(base)
    answers = generate(base, PROMPTS, max_new_tokens=6, end_ids=[], batch_size=2)
    assert answers == [greedy(reference, prompt, limit=6, ends=()) for prompt in PROMPTS]
