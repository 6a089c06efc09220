"""A stage that is validated while it trains hands on the weights of its least held-out loss, and that loss is true."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from alignment.config.data import DataConfig, ValidationConfig
from alignment.config.model import CONTINUE, AdapterConfig, Chain
from alignment.core.errors import ConfigError, DataError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.job import StageSpec
from alignment.pipeline.sweeps.objectives import Objective
from alignment.stages.registry import curves, lines_of
from alignment.stages.reward.run import split
from alignment.stages.shared.preference_pairs import prompts_of, read_pairs, split_by_prompt
from alignment.training.context import StageContext
from alignment.training.validation import Looks
from tests.chained import DORA, FULL, LORA, Chained, config_of
from tests.noisy import (
    HELD_OUT,
    STEPS,
    by_hand,
    handed_on_policy,
    held_out_losses,
    held_out_rows,
    lines,
    logprobs,
    manifest,
    noise,
    overfitting,
    ran,
    write_rows,
)

OWN = ValidationConfig(data=DataConfig(source="own"), every=2, keep_best=True)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_the_step_with_the_least_held_out_loss_is_handed_on(tmp_path: Path, kind: str) -> None:
    spec = overfitting(Chained(tmp_path), kind, FULL)
    looks = held_out_losses(ran(spec))
    assert list(looks) == list(range(2, STEPS[kind] + 1, 2))
    best = min(looks, key=lambda step: looks[step])
    last = max(looks)
    assert 2 < best < last, "it should fall and then rise"
    loss, accuracy = by_hand(spec, held_out_rows(spec))
    assert loss == pytest.approx(looks[best], rel=1e-5)
    assert abs(looks[last] - looks[best]) > 0.01
    metrics = manifest(spec)
    line = next(line for line in lines(spec) if line["step"] == best)
    assert metrics["validation/loss"] == pytest.approx(loss, rel=1e-5)
    assert (metrics["validation/step"], metrics["validation/last_step"]) == (best, last)
    assert metrics["validation/last_loss"] == pytest.approx(looks[last], rel=1e-5)
    assert metrics["validation/accuracy"] == line["validation/accuracy"]
    if accuracy is not None:
        assert metrics["validation/accuracy"] == pytest.approx(accuracy)
    if kind != "reward":
        assert metrics["loss"] == line["loss"], "the figures are those of the step that is handed on"
    (sentence,) = lines_of(kind, spec.artifact)
    assert sentence.startswith(f"{kind} keeps step {best}, which had the lowest held-out loss: {looks[best]:.4g}")


@pytest.mark.parametrize("packing", [False, True])
def test_a_look_has_no_dropout_and_counts_learned_tokens_whatever_the_micro_batches(
    tmp_path: Path, *, packing: bool
) -> None:
    adapter = replace(LORA, dropout=0.4)
    spec = overfitting(Chained(tmp_path), "sft", adapter, max_steps=4, packing=packing)
    config: Any = spec.config
    spec = replace(spec, config=replace(config, optim=replace(config.optim, micro_batch_tokens=100)))
    ran(spec)
    loss, _ = by_hand(spec, held_out_rows(spec))
    assert manifest(spec)["validation/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("adapter", "before"),
    [(DORA, None), (LORA, LORA), (replace(LORA, chain=Chain.stack), LORA), (replace(LORA, chain=CONTINUE), LORA)],
    ids=["dora", "merge", "stack", "continue"],
)
def test_the_best_weights_of_an_adapter_are_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: AdapterConfig, before: AdapterConfig | None
) -> None:
    chained = Chained(tmp_path)
    if before is not None:
        chained.run("sft", before)
    spec = overfitting(chained, "sft", adapter, max_steps=6, rate=0.1)
    if before is not None:
        spec = replace(spec, stage="second", artifact=tmp_path / "second", inputs={"init": chained.inputs["sft"]})
    add = Looks.add
    monkeypatch.setattr(
        Looks, "add", lambda looks, step, loss, patience: add(looks, step, loss + step, patience=patience)
    )
    looks = held_out_losses(ran(spec))
    assert manifest(spec)["validation/step"] == 2
    loss, _ = by_hand(spec, held_out_rows(spec))
    assert loss == pytest.approx(looks[2], rel=1e-4)
    assert abs(looks[6] - looks[2]) > 0.01


def own_data(folder: Path, kind: str, **changes: Any) -> StageSpec:
    """A stage with held-out rows of their own, so that none is taken from its data."""
    spec = overfitting(Chained(folder), kind, **{"adapter": LORA, "validation": OWN, "max_steps": 5, **changes})
    return replace(
        spec, extra_data={"validation.data": write_rows(folder / "own.jsonl", noise(kind, rows=5, first=50))}
    )


@pytest.mark.parametrize(("kind", "adapter"), [("sft", replace(LORA, dropout=0.4)), ("dpo", FULL)])
def test_looking_changes_no_step(tmp_path: Path, kind: str, adapter: Any) -> None:
    """Nor the order of the rows, nor what dropout draws."""
    runs = []
    for every in (0, 1):
        validation = replace(OWN, keep_best=False, every=every) if every else ValidationConfig()
        spec = own_data(tmp_path / str(every), kind, adapter=adapter, validation=validation)
        rows = [
            {name: value for name, value in line.items() if not name.startswith("validation/") and name != "seconds"}
            for line in ran(spec)
        ]
        files = sorted(spec.artifact.rglob("*.safetensors"))
        runs.append((rows, {file.relative_to(spec.artifact): file.read_bytes() for file in files}))
    assert runs[0] == runs[1]
    assert runs[0][1], "there are weights"


def test_texts_are_validated_on_texts_of_their_own(tmp_path: Path) -> None:
    """Every token but a row's first is learned, the end of the text too."""
    chained, texts = Chained(tmp_path), ["The shop is closed on Monday.", "Please answer in two sentences."]
    validation = replace(OWN, every=1)
    spec = chained.spec("cpt", FULL, config=config_of("cpt", FULL, validation=validation))
    own = write_rows(tmp_path / "own.jsonl", [{"text": text} for text in texts])
    spec = replace(spec, extra_data={"validation.data": own})
    ran(spec)
    tokenizer = load_tokenizer(spec.base_path, None)
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
    every = [logprob for row in rows for logprob in logprobs(handed_on_policy(spec), row[:1], row[1:])]
    assert max(map(len, rows)) <= 64, "each is one row"
    assert manifest(spec)["validation/loss"] == pytest.approx(-sum(every) / len(every), rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_without_keep_best_the_last_step_is_handed_on_with_its_own_loss(tmp_path: Path, *, precompute: bool) -> None:
    """A precomputed reference covers the held-out pairs."""
    changes = {"validation": replace(OWN, keep_best=False), "precompute_reference": precompute}
    spec = own_data(tmp_path, "dpo", adapter=FULL, max_steps=5, log_every=100, **changes)
    looks = held_out_losses(ran(spec))
    assert list(looks) == [2, 4, 5], "the last step is looked at too"
    assert [line["step"] for line in lines(spec)] == [2, 4, 5], "one line for each look, whatever log_every says"
    loss, _ = by_hand(spec, noise("dpo", rows=5, first=50))
    assert manifest(spec)["validation/loss"] == pytest.approx(loss, rel=1e-5) == pytest.approx(looks[5], rel=1e-5)
    assert lines_of("dpo", spec.artifact) == []
    objective = Objective(stage="dpo", arm="", metric="validation/loss", minimize=True)
    assert objective.read(spec.artifact).mean == manifest(spec)["validation/loss"]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_patience_ends_the_stage_and_the_sentence_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_interrupted: bool
) -> None:
    """Also that of a stage which is stopped between the two looks that end it."""
    spec = overfitting(Chained(tmp_path), "sft", FULL, replace(HELD_OUT, patience=2), max_steps=40, save_every=1)
    add = Looks.add

    def interrupted(looks: Looks, step: int, loss: float, *, patience: int | None) -> bool:
        if looks.since_best == 1 and loss >= looks.best_loss:
            raise KeyboardInterrupt
        return add(looks, step, loss, patience=patience)

    if is_interrupted:
        with monkeypatch.context() as patched:
            patched.setattr(Looks, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ran(spec)
    looks = held_out_losses(ran(spec))
    best = min(looks, key=lambda step: looks[step])
    assert max(looks) == best + 4, "two looks after the best one"
    assert manifest(spec)["validation/planned_steps"] == 40
    manifest_file = spec.artifact / "manifest.json"
    written = json.loads(manifest_file.read_text())
    written["identity"] = {"config": {"validation": {"patience": 2}}}
    manifest_file.write_text(json.dumps(written))
    assert lines_of("sft", spec.artifact)[1] == f"sft stopped at step {best + 4} of 40: no improvement in 2 validations"


def test_held_out_rows_that_are_learned_and_looks_that_never_come_are_refused(tmp_path: Path) -> None:
    spec = own_data(tmp_path, "sft")
    write_rows(spec.extra_data["validation.data"], noise("sft", rows=4, first=15))
    with pytest.raises(DataError, match="2 of 4 held-out rows have a prompt that is also trained on"):
        ran(spec)
    with pytest.raises(ConfigError, match="6 is more than the 5 optimiser steps of the stage"):
        ran(own_data(tmp_path / "late", "sft", validation=replace(OWN, every=6)))
    with pytest.raises(DataError, match=r"0.9 of the prompts leaves 2 rows to learn from, less than one batch of 4"):
        ran(overfitting(Chained(tmp_path / "much"), "sft", LORA, replace(HELD_OUT, share=0.9)))


def test_texts_that_only_end_alike_are_different_ones(tmp_path: Path) -> None:
    """A text that fills its rows leaves a last one with nothing but the token that ends every text."""
    chained = Chained(tmp_path)
    config = config_of("cpt", FULL, validation=replace(OWN, every=1))
    spec = chained.spec("cpt", FULL, config=config)
    tokenizer = load_tokenizer(spec.base_path, None)
    texts = [_of_length(tokenizer, word, config.max_length) for word in (" shop", " key")]
    spec = replace(spec, data_path=write_rows(tmp_path / "rows.jsonl", [{"text": texts[0]}] * 4))
    spec = replace(spec, extra_data={"validation.data": write_rows(tmp_path / "own.jsonl", [{"text": texts[1]}])})
    ran(spec)
    spec = replace(spec, extra_data={"validation.data": spec.data_path})
    with pytest.raises(DataError, match="8 of 8 held-out rows have a prompt that is also trained on"):
        ran(spec)


def _of_length(tokenizer: Any, word: str, length: int) -> str:
    text = word * length
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
    cut: str = tokenizer.decode(ids)
    assert tokenizer(cut, add_special_tokens=False)["input_ids"] == ids
    return cut


def test_a_pair_that_a_reward_model_reports_on_is_not_looked_at(tmp_path: Path) -> None:
    """Else the step with the best ``eval_accuracy`` might be chosen."""
    spec = own_data(tmp_path, "reward", eval_fraction=0.25)
    config: Any = spec.config
    context, tokenizer = StageContext(spec=spec, rank=0, world_size=1), load_tokenizer(spec.base_path, None)
    pairs, _ = read_pairs(config, context, tokenizer)
    _, reported = split(pairs, 0.25, context.generator("split"), where="")
    (number,) = re.findall(r"Word (\d+)", tokenizer.decode(reported[0]["prompt"]))
    write_rows(spec.extra_data["validation.data"], noise("reward", rows=1, first=int(number)))
    with pytest.raises(DataError, match="1 of 1 held-out rows have a prompt on which the stage reports its result"):
        ran(spec)


def test_no_prompt_and_no_conversation_is_on_both_sides() -> None:
    """In conversations it is all that stands before the first learned token."""
    rows = [([number % 5, 7, number], [-100, -100, number]) for number in range(12)]
    table = Dataset.from_dict({"input_ids": [row for row, _ in rows], "labels": [labels for _, labels in rows]})
    assert len(set(prompts_of(table))) == 5
    sides = split_by_prompt(table, 0.4, torch.Generator().manual_seed(0), where="", setting="")
    prompts = [{tuple(rows[index][0][:2]) for index in side} for side in sides]
    assert [len(side) for side in prompts] == [3, 2]
    assert not prompts[0] & prompts[1]
    assert sorted([*sides[0], *sides[1]]) == list(range(12))
    rows = [(f"x:{record}", [record, *range(9, 9 + turn), 7]) for record in range(10) for turn in range(3)]
    table = Dataset.from_dict(
        {
            "where": [where for where, _ in rows],
            "input_ids": [ids for _, ids in rows],
            "labels": [[-100] * (len(ids) - 1) + ids[-1:] for _, ids in rows],
        }
    )
    learned, held_out = split_by_prompt(table, 0.3, torch.Generator().manual_seed(0), where="", setting="")
    assert len(held_out) == 9
    assert {table[row]["where"] for row in learned} & {table[row]["where"] for row in held_out} == set()


def test_the_rest_is_held_out_of_what_the_evaluation_leaves_and_drawn_beside_training(tmp_path: Path) -> None:
    spec = overfitting(Chained(tmp_path), "reward", FULL, max_steps=2, eval_fraction=0.25)
    ran(spec)
    metrics = manifest(spec)
    assert (metrics["eval_rows"], metrics["validation/rows"], metrics["rows"]) == (4, 4, 9)
    for kind in ("cpt", "sft", "reward", "dpo"):
        drawn = curves(kind, {"validation": {"every": 5}})
        assert [chart.keys[1:] for chart in drawn[:2]] == [("validation/loss",), ("validation/accuracy",)]
        assert drawn[0].labels == ("training", "held-out")
        assert all(len(chart.keys) == 1 for chart in curves(kind, {})[:2])
