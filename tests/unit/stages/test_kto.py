"""KTO as the stage computes it, against the paper's formula and against TRL's own trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl.trainer import kto_trainer

from alignment.config.model import AdapterConfig
from alignment.core.artifacts import verify
from alignment.core.errors import DataError
from alignment.data.tokens.row_kinds import LABELLED_ANSWERS
from alignment.models.assembly.adapters import at_start
from alignment.stages.kto import run as kto
from alignment.stages.kto.kind import KtoLoss
from alignment.stages.kto.run import TokenizedKtoTrainer, mismatched
from alignment.stages.registry import kind_named
from alignment.stages.shared.kind_answers import limits_of_parts
from alignment.stages.shared.result import initial_policy
from alignment.stages.shared.stage_rows import token_rows
from alignment.training.context import StageContext
from tests.chained import FULL, LORA, Chained, config_of
from tests.oracles import kto as oracle
from tests.oracles.close import close
from tests.tiny import liven, tiny_tokenizer

BETA = 0.7
WEIGHTS = (1.5, 0.6)
QUESTIONS = ("Shop?", "Keys, please?", "When is the hall open today?", "Why?", "Who is there now?", "How far is it?")


def labelled(folder: Path, labels: Sequence[bool], questions: Sequence[str] = QUESTIONS) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": questions[number % len(questions)]}],
            "completion": "It is here, " * (number % 3) + f"number {number}.",
            "label": label,
        }
        for number, label in enumerate(labels)
    ]
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made(
    folder: Path, labels: Sequence[bool] = (True, False, True, True, False, True), **changes: Any
) -> TokenizedKtoTrainer:
    chained = Chained(folder)
    adapter: AdapterConfig = changes.pop("adapter", LORA)
    config: Any = config_of(
        "kto", adapter, **{"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.6, **changes}
    )
    config = replace(config, optim=replace(config.optim, batch_size=len(labels), micro_batch_tokens=60))
    spec = replace(chained.spec("kto", adapter, config=config), data_path=labelled(folder, labels))
    context = StageContext(spec=spec, rank=0, world_size=1)
    start, tokenizer = initial_policy(context)
    rows, _ = token_rows(context, LABELLED_ANSWERS, config.data, limits_of_parts(config), tokenizer)
    return kto._trainer(
        config, context, start, tokenizer, rows, kto.weights_of(config, kto.count_labels(rows), where="")
    )


def logprob(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    logprobs = model(ids).logits[0].double().log_softmax(-1)
    return sum(logprobs[index - 1, ids[0, index]] for index in range(len(prompt), ids.shape[1]))  # type: ignore[return-value]


def by_hand(trainer: TokenizedKtoTrainer, loss: KtoLoss) -> tuple[float, torch.Tensor, float, list[float]]:
    rows = list(trainer.train_dataset)
    prompts, answers = [row["prompt_ids"] for row in rows], [row["completion_ids"] for row in rows]
    labels = [row["label"] for row in rows]
    policy = trainer.model.get_base_model()
    z0 = 0.0
    with torch.no_grad(), at_start(trainer.model) as start:
        reference = [float(logprob(start, *row)) for row in zip(prompts, answers, strict=True)]
    if loss is KtoLoss.kto:
        crossed = [(prompts[x], answers[y]) for x, y in oracle.rotated([str(p) for p in prompts], len(rows))]
        with torch.no_grad():
            own = [float(logprob(policy, *row)) for row in crossed]
            with at_start(trainer.model) as start:
                z0 = oracle.divergence(own, [float(logprob(start, *row)) for row in crossed])
    logprobs = [logprob(policy, *row) for row in zip(prompts, answers, strict=True)]
    ratios = [float(own.detach()) - other for own, other in zip(logprobs, reference, strict=True)]
    slopes = oracle.gradient(ratios, labels, z0, beta=BETA, weights=WEIGHTS)
    trainer.model.zero_grad()
    sum(slope * own for slope, own in zip(slopes, logprobs, strict=True)).backward()  # type: ignore[union-attr]
    return oracle.loss(ratios, labels, z0, beta=BETA, weights=WEIGHTS), gradients(trainer.model), z0, ratios


def gradients(model: PeftModel) -> torch.Tensor:
    return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.requires_grad])


def step(trainer: TokenizedKtoTrainer) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    assert len(trainer._micro_batches(batch)) > 1
    loss = float(trainer.training_step(trainer.model, batch))
    return loss, gradients(trainer.model)


@pytest.mark.parametrize(
    ("loss", "towards", "precompute"),
    [(loss, towards, False) for loss in KtoLoss for towards in (1.0, -1.0)] + [(KtoLoss.kto, 1.0, True)],
)
def test_the_loss_and_its_gradient_are_those_of_the_paper(
    tmp_path: Path, loss: KtoLoss, towards: float, *, precompute: bool
) -> None:
    """Where mismatched answers became likelier, z0 is positive and shifts every row; elsewhere it is cut off at 0."""
    trainer = made(tmp_path, loss=loss, precompute_reference=precompute)
    kto.check_start(trainer)
    move(trainer, towards)
    got, got_gradient = step(trainer)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    expected, expected_gradient, z0, ratios = by_hand(trainer, loss)
    close(got, expected, rtol=1e-4)
    same_gradient(got_gradient, expected_gradient)
    assert (z0 > 0.1) is (loss is KtoLoss.kto and towards > 0)
    close(metrics["kl"], z0, rtol=1e-4, atol=1e-5)
    labels = trainer.train_dataset["label"]
    rewards = [
        sum(BETA * ratio for ratio, label in zip(ratios, labels, strict=True) if label is side) / labels.count(side)
        for side in (True, False)
    ]
    close(metrics["rewards/chosen"], rewards[0], rtol=1e-4)
    close(metrics["rewards/rejected"], rewards[1], rtol=1e-4)
    close(metrics["rewards/margins"], rewards[0] - rewards[1], rtol=1e-4, atol=1e-5)


def same_gradient(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6


def move(trainer: TokenizedKtoTrainer, towards: float) -> None:
    liven(trainer.model)
    rows = list(trainer.train_dataset)
    optimizer = torch.optim.SGD([w for w in trainer.model.parameters() if w.requires_grad], lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        total = sum(logprob(trainer.model, row["prompt_ids"], row["completion_ids"]) for row in rows)
        (-towards * total / len(rows)).backward()  # type: ignore[operator]
        optimizer.step()


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_the_first_loss_is_half_the_mean_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig, *, precompute: bool
) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("all weights would be read once more")

    monkeypatch.setattr(kto_trainer, "hash_module", refuse)
    trainer = made(tmp_path, adapter=adapter, precompute_reference=precompute)
    kto.check_start(trainer)
    loss, _ = step(trainer)
    assert loss == pytest.approx(0.5 * (4 * 1.5 + 2 * 0.6) / 6, rel=1e-5)
    assert trainer._metrics["train"]["kl"] == pytest.approx([0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "size", "expected"),
    [
        ("abcde", 3, [2, 0, 1, 4, 3]),
        ("aabb", 4, [2, 3, 0, 1]),  # a distance of one would put two answers beside their own prompt
        ("aaab", 4, [3, 0, 1, 2]),  # no distance avoids it; the least of the best
        ("abcd", 3, [2, 0, 1, 2]),  # the last batch has one row
        ("a", 2, [0]),
    ],
)
def test_each_prompt_gets_the_answer_of_another_row_of_its_batch(prompts: str, size: int, expected: list[int]) -> None:
    assert mismatched(prompts, size) == expected


def test_rows_of_one_prompt_meet_answers_to_another_which_are_cut(tmp_path: Path) -> None:
    """As a sampling stage writes them: several answers to each prompt, one after another."""
    chained = Chained(tmp_path)
    config: Any = config_of("kto", LORA)
    config = replace(config, optim=replace(config.optim, batch_size=4))
    spec = replace(
        chained.spec("kto", LORA, config=config), data_path=labelled(tmp_path, [True, False] * 4, ["A?", "B?"])
    )
    context = StageContext(spec=spec, rank=0, world_size=1)
    rows, _ = token_rows(context, LABELLED_ANSWERS, config.data, limits_of_parts(config), tiny_tokenizer())
    ordered = kto.in_order(rows, context.generator("order"), batch_size=4, max_length=4096, mismatch=True)
    answers = {tuple(row["completion"]): (row["prompt"], number) for number, row in enumerate(ordered)}
    assert len(answers) == 8
    for number, row in enumerate(ordered):
        _, other = answers[tuple(row["KL_completion"])]
        assert other != number
        assert other // 4 == number // 4, "of the same batch"
    labels = {tuple(row["completion"]): row["label"] for row in ordered}
    assert labels == {tuple(row["desirable"] or row["undesirable"]): bool(row["desirable"]) for row in rows}
    assert [row["prompt"] for row in ordered] != [row["prompt"] for row in rows], "they are shuffled"
    rows = Dataset.from_dict(
        {
            "prompt": [[1] * 5, [2] * 2, [3] * 4],
            "desirable": [[10], [], [30, 31]],
            "undesirable": [[], [20, 21, 22, 23], []],
            "where": ["rows:1", "rows:2", "rows:3"],
        }
    )
    ordered = kto.in_order(rows, torch.Generator().manual_seed(0), batch_size=3, max_length=6, mismatch=True)
    assert sorted(row["completion"] for row in ordered) == [[10], [20, 21, 22, 23], [30, 31]]
    for number, row in enumerate(ordered):
        other = ordered[(number - 1) % 3]["completion"]
        assert row["KL_completion"] == other[: 6 - len(row["prompt"])]
    longest = next(row for row in ordered if len(row["prompt"]) == 5)
    assert len(longest["KL_completion"]) == 1, "it was cut"


def metrics_of(chained: Chained) -> dict[str, float]:
    artifact = chained.inputs["kto"].path
    assert artifact is not None
    return dict(verify(artifact, content=True).metrics)


def test_a_pair_is_a_desirable_and_an_undesirable_answer(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    lines = chained.run("kto", LORA)
    metrics = metrics_of(chained)
    assert [metrics[name] for name in ("rows", "desirable_rows", "undesirable_rows")] == [8, 4, 4]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-4)
    kind, config = kind_named("kto"), chained.spec("kto", LORA).config
    assert set(kind.metrics(config).names) <= metrics.keys()
    drawn = {key for chart in kind.display.curves({}) for key in chart.keys}
    assert all(drawn <= line.keys() for line in lines)


def test_a_figure_that_the_last_batch_lacks_is_reported_as_it_last_was(tmp_path: Path) -> None:
    """Five rows in batches of two: the last batch has one row, so no margin. Weights follow from labels."""
    chained = Chained(tmp_path)
    config: Any = config_of("kto", LORA)
    config = replace(config, optim=replace(config.optim, batch_size=2))
    lines = chained.run("kto", LORA, config=config, data_path=labelled(tmp_path, [True, False, True, False, True]))
    margins = [line["rewards/margins"] for line in lines if "rewards/margins" in line]
    assert margins
    assert "rewards/margins" not in lines[-1]
    metrics = metrics_of(chained)
    assert metrics["rewards/margins"] == margins[-1]
    names = ("desirable_rows", "undesirable_rows", "desirable_weight", "undesirable_weight")
    assert [metrics[name] for name in names] == [3, 2, 1, 1.125]
    for label, missing in ((True, "undesirable"), (False, "desirable")):
        with pytest.raises(DataError, match=f"none of the 3 rows is {missing},"):
            Chained(tmp_path / missing).run("kto", LORA, data_path=labelled(tmp_path, [label] * 3))
