"""DPO's losses on a policy that has moved away from its reference, against their papers' formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from alignment.config.stage import DpoConfig, DpoLoss
from alignment.models.adapters import at_start
from alignment.stages import dpo
from alignment.stages.initial import initial_policy
from alignment.stages.pairs import read_pairs
from alignment.training.context import StageContext
from tests.chained import LORA, Chained, config_of
from tests.oracles.close import close
from tests.tiny import liven

BETA = 0.7


def log_ratios(policy: torch.Tensor, reference: torch.Tensor, ids: list[int], start: int) -> list[float]:
    """log π/π_ref of each token from ``start`` on, from logits ``[tokens, vocabulary]``."""
    told = []
    for place in range(start, len(ids)):
        pair = [logits[place - 1].double().log_softmax(-1)[ids[place]] for logits in (policy, reference)]
        told.append(float(pair[0] - pair[1]))
    return told


def expected(loss: DpoLoss, chosen: list[float], rejected: list[float]) -> float:
    if loss in (DpoLoss.sigmoid, DpoLoss.hinge):
        delta = sum(chosen) - sum(rejected)
    else:
        delta = sum(chosen) / len(chosen) - sum(rejected) / len(rejected)
    if loss is DpoLoss.hinge:
        return max(0.0, 1.0 - BETA * delta)
    if loss is DpoLoss.ipo:
        return (delta - 1.0 / (2.0 * BETA)) ** 2
    return math.log1p(math.exp(-BETA * delta))


@pytest.mark.parametrize("loss", list(DpoLoss), ids=lambda loss: loss.value)
def test_a_loss_is_that_of_its_paper_before_and_after_the_policy_moved(tmp_path: Path, loss: DpoLoss) -> None:
    chained = Chained(tmp_path)
    config = config_of("dpo", LORA, beta=BETA, loss=loss)
    assert isinstance(config, DpoConfig)
    context = StageContext(spec=chained.spec("dpo", LORA, config=config), rank=0, world_size=1)
    found, tokenizer = initial_policy(context)
    pairs, _ = read_pairs(config, context, tokenizer)
    trainer = dpo._trainer(config, context, found, tokenizer, pairs[:1])
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    dpo.check_start(trainer, config)
    liven(trainer.model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        got = float(trainer.compute_loss(trainer.model, batch))
    pair = pairs[0]
    sides = []
    for answer in (pair.chosen, pair.rejected):
        ids = torch.tensor([pair.prompt + answer])
        base = trainer.model.get_base_model()
        with torch.no_grad():
            policy = base(ids).logits[0]
            with at_start(trainer.model) as reference:
                sides.append(log_ratios(policy, reference(ids).logits[0], ids[0].tolist(), len(pair.prompt)))
    assert abs(sum(sides[0]) - sum(sides[1])) > 0.1
    close(got, expected(loss, *sides), rtol=1e-4)
