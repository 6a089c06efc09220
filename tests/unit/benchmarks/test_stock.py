"""The plain loop, in which no setting changes a loss or a step; and the critic with an adapter, for TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.contestants.stock import train
from benchmarks.contestants.training import with_adapter
from benchmarks.measure import Steps
from benchmarks.setting import WITHOUT_AUTOCAST
from tests.tiny import tiny_model, tiny_scorer

ROWS = [
    {"input_ids": [5 + i, 6, 7, *range(20, 20 + i)], "labels": [-100, 6, -100, *range(20, 20 + i)]} for i in range(16)
]
PAIRS = [
    {"prompt": [5, 6 + i], "chosen": [7, *range(30, 30 + i)], "rejected": [9, 8] if i % 2 else [9]} for i in range(16)
]
ANSWERS = [
    {"prompt": [5, 6 + i], "completion": [7, *range(30, 30 + i)], "KL_completion": [9, 8 + i], "label": i % 3 > 0}
    for i in range(16)
]
PLAIN = {"micro_rows": 8, "checkpointing": False, "precision": WITHOUT_AUTOCAST, "padding_free": False}
CHANGES: list[dict[str, Any]] = [{"micro_rows": 1}, {"micro_rows": 4, "checkpointing": True}]


def _losses(kind: str, rows: list[dict[str, Any]], **changes: Any) -> list[float]:
    """Of two steps of a tiny model with an adapter."""
    setting = PLAIN | changes
    torch.manual_seed(0)
    model: Any = tiny_scorer(use_cache=False) if kind == "reward" else tiny_model(use_cache=False)
    task_type = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    lora = LoraConfig(task_type=task_type, r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora)
    if setting["checkpointing"]:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    steps = Steps(1)
    task = {"kind": kind, "adapter": "lora", "steps": 2, "setting": setting}
    train(model.train(), rows, model.config.pad_token_id, task, steps)
    assert len(steps.seconds) == 1
    return steps.losses


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize(("kind", "rows"), [("sft", ROWS), ("reward", PAIRS), ("dpo", PAIRS), ("kto", ANSWERS)])
def test_no_setting_changes_a_loss(kind: str, rows: list[dict[str, Any]], change: dict[str, Any]) -> None:
    losses = _losses(kind, rows)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "the second step has other rows and other weights"
    assert _losses(kind, rows, **change) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("micro_rows", [8, 4])
def test_rows_without_padding_do_not_see_each_other(micro_rows: int) -> None:
    assert _losses("sft", ROWS, padding_free=True, micro_rows=micro_rows) == pytest.approx(
        _losses("sft", ROWS), rel=1e-5
    )


def test_after_the_last_row_come_the_first() -> None:
    torch.manual_seed(0)
    setting, losses = PLAIN | {"micro_rows": 4}, []
    for rows in (ROWS, [*ROWS, *ROWS]):
        steps = Steps(2)
        model = tiny_model(use_cache=False).train()
        train(model, rows, 2, {"kind": "sft", "adapter": "full", "steps": 4, "setting": setting}, steps)
        losses.append(steps.losses)
        assert len(steps.seconds) == 2, "the first two are a warm-up"
    assert losses[0] == losses[1]


def test_the_loss_is_the_mean_over_all_labels_of_the_step() -> None:
    model = tiny_model().eval()
    logprobs = []
    for row in ROWS[:8]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                logprobs.append(float(logits[position].log_softmax(-1)[label]))
    torch.manual_seed(0)
    steps = Steps(0)
    setting = {**PLAIN, "micro_rows": 4}
    train(
        tiny_model(use_cache=False).train(),
        ROWS,
        2,
        {"kind": "sft", "adapter": "full", "steps": 1, "setting": setting},
        steps,
    )
    assert steps.losses == [pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-5)]
    assert len(steps.seconds) == 1, "without a warm-up the first step is measured"


def test_a_critic_with_an_adapter_learns_with_it_and_with_its_head_and_begins_as_it_was() -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    plain = tiny_scorer().eval().bfloat16()
    before = plain(input_ids=ids).logits.detach().clone()
    critic = with_adapter(plain)
    trained = {name: weight for name, weight in critic.named_parameters() if weight.requires_grad}
    assert {name.split(".")[-3] for name in trained if name != "score.weight"} == {"lora_A", "lora_B"}
    assert len(trained) == 2 * 2 * 7 + 1, "two factors in each of seven layers of two blocks, and the head"
    assert {weight.dtype for name, weight in trained.items() if "lora_" in name} == {torch.float32}
    assert type(critic) is type(tiny_scorer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(critic(input_ids=ids).logits.float(), before.float(), rtol=1e-2, atol=1e-2)
