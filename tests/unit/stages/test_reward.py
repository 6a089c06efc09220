"""The reward stage on a tiny model: its loss, held-out figures and offset, against scores from a plain forward pass."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from alignment.core.artifacts import read_manifest
from alignment.models.assembly.reward_head import load_reward_model
from alignment.models.forward.answers import unwrapped
from alignment.stages.registry import kind_named
from alignment.stages.reward import run as reward
from alignment.stages.reward.config import RewardConfig
from alignment.stages.shared.initial import initial_policy
from alignment.stages.shared.preference_pairs import read_pairs
from alignment.training.context import StageContext
from tests.chained import LORA, Chained, config_of
from tests.oracles.close import close
from tests.pairs import TokenizedPair, as_pairs, as_table


def config(**changes: Any) -> RewardConfig:
    """Half of eight pairs held out, and steps so small that scores stay nearly those of the fresh head."""
    made = config_of("reward", LORA, **changes)
    assert isinstance(made, RewardConfig)
    return replace(made, eval_fraction=0.5, optim=replace(made.optim, lr=1e-6))


def raw_score(model: Any, prompt: list[int], answer: list[int]) -> float:
    """head · state at the last token, by transformers' own forward pass of the trunk."""
    plain = unwrapped(model)
    head = plain.score.modules_to_save["default"] if hasattr(plain.score, "modules_to_save") else plain.score
    with torch.no_grad():
        states = plain.base_model(input_ids=torch.tensor([prompt + answer])).last_hidden_state
        return float(states[0, -1].double() @ head.weight[0].double())


def sides(model: Any, pair: TokenizedPair) -> tuple[float, float]:
    return raw_score(model, pair.prompt, pair.chosen), raw_score(model, pair.prompt, pair.rejected)


def minus_log_sigmoid(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def pairs_of(chained: Chained, settings: RewardConfig) -> tuple[StageContext, Any, Any, Dataset]:
    context = StageContext(spec=chained.spec("reward", LORA, config=settings), rank=0, world_size=1)
    start, tokenizer = initial_policy(context)
    return context, start, tokenizer, read_pairs(settings, context, tokenizer)[0]


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_the_loss_is_that_of_bradley_and_terry_with_its_centre(tmp_path: Path, center: float) -> None:
    settings = config(center_coefficient=center)
    context, start, tokenizer, pairs = pairs_of(Chained(tmp_path), settings)
    trainer = reward._trainer(settings, context, start, tokenizer, pairs.select([0]))
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    chosen, rejected = sides(trainer.model, as_pairs(pairs)[0])
    assert abs(chosen - rejected) > 0.1, "which of them is chosen must matter"
    assert abs(chosen + rejected) > 0.1, "and the centre"
    close(loss, minus_log_sigmoid(chosen - rejected) + center * (chosen + rejected) ** 2, rtol=1e-4)


def test_a_margin_is_subtracted_from_what_sigma_takes_on_learned_and_on_held_out_rows(tmp_path: Path) -> None:
    """Touvron et al. 2023, eq. 2, times the setting."""
    settings = config(margin=0.25)
    chained = Chained(tmp_path)
    file = tmp_path / "scored.jsonl"
    rows = [
        {"prompt": f"{number}?", "chosen": "It is closed.", "rejected": "No.", "chosen_score": 3, "rejected_score": 1}
        for number in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = replace(chained.spec("reward", LORA, config=settings), data_path=file)
    context = StageContext(spec=spec, rank=0, world_size=1)
    start, tokenizer = initial_policy(context)
    pairs = read_pairs(settings, context, tokenizer)[0].select([0])
    trainer = reward._trainer(settings, context, start, tokenizer, pairs)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    chosen, rejected = sides(trainer.model, TokenizedPair(**pairs.select_columns(["prompt", "chosen", "rejected"])[0]))
    close(loss, minus_log_sigmoid(chosen - rejected - 0.5), rtol=1e-4)
    validation = reward._validation(settings, context, trainer, pairs)
    assert validation is not None
    trainer.model.eval()
    held_out = validation._held_out
    with torch.no_grad():
        held_out_loss, *_ = trainer.held_out_loss(trainer.model, trainer.data_collator([held_out.rows[0]]))
    close(held_out_loss, loss, rtol=1e-4)


def test_held_out_figures_and_the_offset_are_of_the_saved_model(tmp_path: Path) -> None:
    settings = config()
    chained = Chained(tmp_path)
    context, _, _, pairs = pairs_of(chained, settings)
    learned, held_out = map(as_pairs, reward.split(pairs, 0.5, context.generator("split"), where=""))
    assert len(held_out) == 4
    assert not {tuple(pair.prompt) for pair in learned} & {tuple(pair.prompt) for pair in held_out}
    chained.run("reward", LORA, config=settings)
    artifact = chained.inputs["reward"].path
    assert artifact is not None
    manifest = read_manifest(artifact)
    assert manifest is not None
    model = load_reward_model(context.spec, chained.inputs["reward"], device=torch.device("cpu"))
    chosen, rejected = (list(side) for side in zip(*(sides(model, pair) for pair in held_out), strict=True))
    margins = [first - second for first, second in zip(chosen, rejected, strict=True)]
    longer = [len(pair.chosen) - len(pair.rejected) for pair in held_out]
    expected = {
        "eval_accuracy": sum(margin > 0 for margin in margins) / 4,
        "eval_loss": sum(map(minus_log_sigmoid, margins)) / 4,
        "eval_margin": sum(margins) / 4,
        "eval_length_rule_accuracy": sum((0.5 if tokens == 0 else tokens > 0) for tokens in longer) / 4,
        "score_offset": sum(chosen) / 4,
        "eval_rows": 4.0,
    }
    assert 0.0 < expected["eval_accuracy"] < 1.0, "neither figure of a constant"
    assert expected["eval_accuracy"] != expected["eval_length_rule_accuracy"]
    assert abs(expected["score_offset"]) > 0.05
    close([manifest.metrics[name] for name in expected], list(expected.values()), rtol=1e-4)
    close(load_file(artifact / "head.safetensors")["offset"], expected["score_offset"], rtol=1e-4)
    close(float(unwrapped(model).score_offset), expected["score_offset"], rtol=1e-4)


def test_an_offset_without_pairs_held_out_is_of_some_drawn_from_all() -> None:
    """The first pairs of a file are often of one kind."""
    pairs = as_table(TokenizedPair(prompt=[n], chosen=[2], rejected=[3]) for n in range(1000))
    numbers = [pair.prompt[0] for pair in as_pairs(reward.drawn(pairs, 64, torch.Generator().manual_seed(0)))]
    assert len(set(numbers)) == 64
    assert max(numbers) > 800
    assert numbers == [pair.prompt[0] for pair in as_pairs(reward.drawn(pairs, 64, torch.Generator().manual_seed(0)))]
    assert len(reward.drawn(pairs.select(range(3)), 64, torch.Generator().manual_seed(0))) == 3


def test_without_pairs_held_out_chosen_answers_of_those_learned_from_score_zero(tmp_path: Path) -> None:
    settings = replace(config(), eval_fraction=0.0)
    chained = Chained(tmp_path)
    context, _, _, pairs = pairs_of(chained, settings)
    chained.run("reward", LORA, config=settings)
    model = load_reward_model(context.spec, chained.inputs["reward"], device=torch.device("cpu"))
    raw = [sides(model, pair)[0] for pair in as_pairs(pairs)]
    close(float(unwrapped(model).score_offset), sum(raw) / len(raw), rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "guide"), [({}, math.log(2)), ({"margin": 1.0}, None), ({"center_coefficient": 0.1}, None)]
)
def test_the_loss_has_a_line_of_chance_only_where_chance_gives_it(
    settings: dict[str, float], guide: float | None
) -> None:
    loss = next(chart for chart in kind_named("reward").curves(settings) if chart.keys == ("loss",))
    assert loss.guide == guide
