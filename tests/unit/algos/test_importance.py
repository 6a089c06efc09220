"""Importance weights beside their oracle (tests/oracles/importance.py)."""

from __future__ import annotations

import pytest
import torch

from alignment.algos.ppo import truncated_importance
from tests.oracles import importance as oracle
from tests.oracles.close import close
from tests.unit.algos.conftest import Batch


def expected(batch: Batch, *, cap: float, whole: bool) -> list[list[float]]:
    width = batch.mask.shape[1]
    rows = []
    for old, sampled, length in zip(batch.logprobs.tolist(), batch.old_logprobs.tolist(), batch.lengths, strict=True):
        weights = oracle.weights(old[:length], sampled[:length], cap=cap, whole=whole)
        rows.append([*weights, *[0.0] * (width - length)])
    return rows


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "answers"])
@pytest.mark.parametrize("cap", [1.0, 1.2, 2.0, 1e6])
def test_weights_are_the_smaller_of_ratio_and_cap(batch: Batch, cap: float, whole: bool) -> None:
    weights = truncated_importance(batch.logprobs, batch.old_logprobs, batch.mask, cap=cap, whole_answers=whole)
    close(weights, expected(batch, cap=cap, whole=whole))


@pytest.mark.parametrize("whole", [False, True], ids=["tokens", "answers"])
def test_on_policy_weights_are_exactly_one(batch: Batch, whole: bool) -> None:
    for cap in (1.0, 2.0):
        weights = truncated_importance(batch.logprobs, batch.logprobs, batch.mask, cap=cap, whole_answers=whole)
        assert torch.equal(weights, batch.mask.double())


def test_a_ratio_that_overflows_is_the_cap() -> None:
    far, mask = torch.tensor([[-1000.0]]), torch.ones(1, 1, dtype=torch.bool)
    assert truncated_importance(0.0 * far, far, mask, cap=3.0, whole_answers=False).item() == pytest.approx(3.0)
    assert truncated_importance(far, 0.0 * far, mask, cap=3.0, whole_answers=False).item() == 0.0
