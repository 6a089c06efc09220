"""A reward model by its stage, against scores from a plain forward pass, and its card as the worker makes it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from alignment import worker
from alignment.config.data import DataConfig, TooLong, TooLongConfig
from alignment.config.model import Dtype, ModelConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation import invariance
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.heads import load_reward_model
from alignment.models.assembly.load import Lineage
from alignment.models.forward.answers import unwrapped
from alignment.pipeline.sweeps.objectives import of_stage
from alignment.stages.reward import run as reward
from alignment.stages.reward.kind import RewardConfig
from alignment.stages.reward.run import split
from alignment.stages.reward_card.kind import RewardCardConfig
from alignment.stages.shared.preference_pairs import read_pairs
from alignment.stages.shared.result import initial_policy
from alignment.training.context import StageContext
from tests.chained import LORA, Chained, config_of
from tests.oracles.close import close
from tests.pairs import TokenizedPair, as_pairs, as_table
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_reward, tiny_scorer, tiny_spec, tiny_tokenizer


def settings_of(**changes: Any) -> RewardConfig:
    made = config_of("reward", LORA, **{"eval_fraction": 0.5, **changes})
    assert isinstance(made, RewardConfig)
    return replace(made, optim=replace(made.optim, lr=1e-6))


def raw_score(model: Any, prompt: list[int], answer: list[int]) -> float:
    plain = unwrapped(model)
    head = plain.score.modules_to_save["default"] if hasattr(plain.score, "modules_to_save") else plain.score
    with torch.no_grad():
        states = plain.base_model(input_ids=torch.tensor([prompt + answer])).last_hidden_state
        return float(states[0, -1].double() @ head.weight[0].double())


def sides(model: Any, pair: TokenizedPair) -> tuple[float, float]:
    return raw_score(model, pair.prompt, pair.chosen), raw_score(model, pair.prompt, pair.rejected)


def minus_log_sigmoid(margin: float) -> float:
    return math.log1p(math.exp(-margin))


def pairs_of(chained: Chained, settings: RewardConfig, **changes: Any) -> tuple[StageContext, Any, Any, Dataset]:
    context = StageContext(spec=chained.spec("reward", LORA, config=settings, **changes), rank=0, world_size=1)
    start, tokenizer = initial_policy(context)
    return context, start, tokenizer, read_pairs(settings, context, tokenizer)[0]


@pytest.mark.parametrize(("center", "margin"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.25)])
def test_the_loss_is_that_of_bradley_and_terry_with_its_centre_and_margin(
    tmp_path: Path, center: float, margin: float
) -> None:
    """The margin is the setting times the difference of scores (Touvron et al. 2023, eq. 2), on held-out rows too."""
    settings = settings_of(center_coefficient=center, margin=margin)
    row = {"chosen": "It is closed.", "rejected": "No.", "chosen_score": 3, "rejected_score": 1}
    file = write_rows(tmp_path / "scored.jsonl", [{"prompt": f"{number}?", **row} for number in range(8)])
    context, start, tokenizer, pairs = pairs_of(Chained(tmp_path), settings, data_path=file)
    trainer = reward._trainer(settings, context, start, tokenizer, pairs.select([0]))
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    chosen, rejected = sides(trainer.model, TokenizedPair(**pairs.select_columns(["prompt", "chosen", "rejected"])[0]))
    assert abs(chosen - rejected) > 0.1, "which of them is chosen must matter"
    assert abs(chosen + rejected) > 0.1, "and the centre"
    expected = minus_log_sigmoid(chosen - rejected - 2 * margin) + center * (chosen + rejected) ** 2
    close(loss, expected, rtol=1e-4)
    if margin:
        trainer.model.eval()
        with torch.no_grad():
            row = trainer.data_collator([reward._dataset(pairs.select([0]), margin)[0]])
            held_out_loss, *_ = trainer.held_out_loss(trainer.model, row)
        close(held_out_loss, loss, rtol=1e-4)


def test_held_out_figures_and_the_offset_are_of_the_saved_model(tmp_path: Path) -> None:
    settings, chained = settings_of(), Chained(tmp_path)
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


def test_an_offset_without_pairs_held_out_is_of_some_drawn_from_all(tmp_path: Path) -> None:
    """The first pairs of a file are often of one kind."""
    table = as_table(TokenizedPair(prompt=[n], chosen=[2], rejected=[3]) for n in range(1000))
    once, again = (
        [pair.prompt[0] for pair in as_pairs(reward.drawn(table, 64, torch.Generator().manual_seed(0)))] for _ in "12"
    )
    assert once == again
    assert len(set(once)) == 64
    assert max(once) > 800
    assert len(reward.drawn(table.select(range(3)), 64, torch.Generator().manual_seed(0))) == 3
    settings, chained = settings_of(eval_fraction=0.0), Chained(tmp_path)
    context, _, _, pairs = pairs_of(chained, settings)
    chained.run("reward", LORA, config=settings)
    model = load_reward_model(context.spec, chained.inputs["reward"], device=torch.device("cpu"))
    raw = [sides(model, pair)[0] for pair in as_pairs(pairs)]
    close(float(unwrapped(model).score_offset), sum(raw) / len(raw), rtol=1e-4)


PAIRS = [TokenizedPair(prompt=[number % 5, 7], chosen=[number], rejected=[number, 2]) for number in range(12)]


def split_of(fraction: float) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    sides = split(as_table(PAIRS), fraction, torch.Generator().manual_seed(0), where="stages.reward")
    return as_pairs(sides[0]), as_pairs(sides[1])


def test_which_prompts_are_held_out_depends_on_their_tokens_and_too_few_are_refused() -> None:
    """Not on the order of the pairs, nor on how the ids are kept."""
    prompts = [[1], [1, 300], [255], [256], [2, 1, 1], [70_000, 3]]
    pairs = as_table(TokenizedPair(prompt=prompt, chosen=[1], rejected=[2]) for prompt in reversed(prompts))
    _, held_out = split(pairs, 0.5, torch.Generator().manual_seed(0), where="")
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:3]
    assert sorted(held_out["prompt"]) == sorted(sorted(prompts)[index] for index in drawn)
    assert split_of(0.0) == (PAIRS, [])
    with pytest.raises(DataError, match=r"5 prompts are too few to hold out a share of 0\.05"):
        split_of(0.05)


RULE = ScoreSourceConfig(source="bundled:quickstart/house_style.py:style")


def rewardbench_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": f"What does note {number} say about the keys in hall {number}?",
        "chosen": f"The keys of hall {number} are with the caretaker.",
        "chosen_model": "one",
        "rejected": f"Sure! Note {number} is a note, and notes are notes about halls and halls.",
        "rejected_model": "other",
        "subset": "keys" if number % 3 else "halls",
        "id": number,
    }
    return {**row, **changes}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    start = Lineage(source=BASE_SOURCE, base=save_tiny_model(folder / "base"), adapters=())
    tiny_reward(folder / "made", LORA, start=start, base_path=folder / "base", identity={"seed": 0})
    return folder


def spec_of(folder: Path, work: Path, config: RewardCardConfig, **changes: Any) -> StageSpec:
    artifact = folder / "made/artifacts/reward-0123abcd"
    fields: dict[str, Any] = {
        "base_path": folder / "base",
        "inputs": {"reward": StageInput(ref="stage:reward", path=artifact)},
        "data_path": work / "pairs.jsonl",
    }
    return tiny_spec(work, config, **{**fields, **changes})


def card_of(spec: StageSpec) -> dict[str, Any]:
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    card: dict[str, Any] = json.loads((spec.artifact / "card.json").read_text())
    return card


def pairs_in(spec: StageSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.artifact / "pairs.jsonl").read_text().splitlines()]


def test_a_file_like_rewardbench_s_gives_a_whole_card(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(24)])
    learned = write_rows(tmp_path / "learned.jsonl", [rewardbench_row(number) for number in range(18, 40)])
    config = RewardCardConfig(bootstrap_samples=50, invariance_pairs=3, rule=RULE, num_worst=4)
    spec = spec_of(folder, tmp_path, config, extra_data={"learned": learned})
    card = card_of(spec)
    pairs = pairs_in(spec)
    assert [pair["id"] for pair in pairs] == [str(number) for number in range(18)], "the others ask what was learned"
    assert card["learned"]["judged_too"] == 6
    assert (card["learned"]["num_pairs"], card["num_pairs"], card["num_prompts"]) == (22, 18, 18)
    assert [subset["name"] for subset in card["subsets"]] == ["halls", "keys"]
    assert sum(subset["num_pairs"] for subset in card["subsets"]) == 18
    accuracy = sum(pair["margin"] > 0 for pair in pairs) / 18
    assert card["accuracy"]["mean"] == pytest.approx(accuracy)
    words, longer = card["baselines"]
    assert words["accuracy"]["mean"] == 1.0, "two words tell all"
    assert longer["accuracy"]["mean"] == 0.0
    assert card["rule"]["accuracy"]["mean"] == 1.0
    assert card["rule"]["agreement"]["mean"] == pytest.approx(accuracy)
    assert card["invariances"]["moved"] == []
    assert list(card["invariances"]["formats"]) == ["float32"], "it is the model's own format"
    assert [pair["margin"] for pair in card["worst"]] == sorted(p["margin"] for p in pairs if p["margin"] < 0)[:4]
    manifest = read_manifest(spec.artifact)
    assert (manifest.kind, manifest.metrics["accuracy"]) == ("reward_card", card["accuracy"]["mean"])
    assert [name for name in manifest.metrics if name not in of_stage(RewardCardConfig())] == [], (
        "a sweep may ask for it"
    )
    assert {"accuracy/bag_of_words", "accuracy/longer_answer", "ece", "brier", "log_loss"} <= manifest.metrics.keys()


def test_a_function_of_yours_is_a_rule_and_names_the_pairs_that_it_cannot_judge(folder: Path, tmp_path: Path) -> None:
    rows = [rewardbench_row(number, words=9 + number) for number in range(4)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    file = tmp_path / "score.py"
    file.write_text(
        "def near(prompts, completions, rows):\n"
        "    return [-abs(row['words'] - len(text.split())) for text, row in zip(completions, rows, strict=True)]\n"
    )
    rule = ScoreSourceConfig(source=f"{file}:near")
    spec = spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, rule=rule))
    right = [abs(len(r["chosen"].split()) - r["words"]) < abs(len(r["rejected"].split()) - r["words"]) for r in rows]
    assert 0 < sum(right) < 4
    assert card_of(spec)["rule"]["accuracy"]["mean"] == sum(right) / 4
    write_rows(pairs, [rewardbench_row(0, words=9), rewardbench_row(1), rewardbench_row(2)])
    with pytest.raises(RewardError, match=f"; these rows have no 'words': {pairs}:2, {pairs}:3; none of its scores"):
        card_of(replace(spec, artifact=spec.artifact.with_name("again"), work=spec.work.with_name("again.work")))


def test_bfloat16_is_held_against_float32_and_there_may_be_no_known_pairs(folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [rewardbench_row(number, subset=None) for number in range(4)])
    spec = spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5, invariance_pairs=16))
    card = card_of(replace(spec, model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)))
    rounded, exact = (card["invariances"]["formats"][name]["changes"] for name in ("bfloat16", "float32"))
    assert card["invariances"]["num_pairs"] == 4
    assert card["invariances"]["moved"] == []
    assert rounded.keys() == exact.keys()
    largest = [max(change["largest"] for change in changes.values()) for changes in (rounded, exact)]
    assert all(change > 0 for change in largest)
    assert rounded != exact
    if not torch.cuda.is_available():  # a kernel may compute a row in the same way whatever stands beside it
        assert largest[1] < largest[0]
    assert (card["num_pairs"], card["learned"], card["rule"], card["subsets"]) == (4, None, None, [])
    assert [baseline["name"] for baseline in card["baselines"]] == ["longer answer"]


def test_pairs_that_were_learned_may_be_judged_and_are_then_counted(folder: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(12)])
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, leave_out_learned=False)
    card = card_of(spec_of(folder, tmp_path, config, extra_data={"learned": file}))
    assert (card["num_pairs"], card["learned"]["judged_too"]) == (12, 12)
    assert card["warnings"][0].startswith("12 of the 12 pairs overlap with the model's training pairs")
    with pytest.raises(DataError, match="all 12 pairs have prompts that the reward model was trained on"):
        card_of(spec_of(folder, tmp_path / "again", RewardCardConfig(), data_path=file, extra_data={"learned": file}))


@pytest.mark.parametrize("too_long", [False, True])
def test_no_pair_is_judged_that_the_reward_stage_took(folder: Path, tmp_path: Path, too_long: bool) -> None:
    """A part is drawn by place among the rows that fit: a row too long, and it is another part."""
    rows = [rewardbench_row(number) for number in range(40)]
    judged = write_rows(tmp_path / "pairs.jsonl", [*rows, *(rewardbench_row(number) for number in range(40, 60))])
    first = rewardbench_row(0, chosen="The keys are here. " * 60) if too_long else rows[0]
    file = write_rows(tmp_path / "learned.jsonl", [first, *rows[1:]])
    taken, artifact = made_from_half(folder, tmp_path, file)
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, learned=DataConfig(fraction=0.5))
    inputs = {"reward": StageInput(ref="stage:reward", path=artifact)}
    spec = spec_of(folder, tmp_path, config, extra_data={"learned": file}, data_path=judged, inputs=inputs)
    card = card_of(spec)
    assert len(taken) == 20
    assert not taken & {pair["chosen"] for pair in pairs_in(spec)}
    assert card["num_pairs"] == (20 if too_long else 40), "all of the file is left out where its part is not known"
    assert card["learned"]["part_known"] is not too_long
    assert (
        any("every pair of the file counts as a training pair" in warning for warning in card["warnings"]) is too_long
    )


def made_from_half(folder: Path, work: Path, file: Path) -> tuple[set[str], Path]:
    config = RewardConfig(data=DataConfig(fraction=0.5), max_length=200)
    spec = tiny_spec(work / "reward", config, base_path=folder / "base", data_path=file)
    context = StageContext(spec=spec, rank=0, world_size=1)
    tokenizer = load_tokenizer(folder / "base")
    pairs, _ = read_pairs(config, context, tokenizer)
    artifact = work / "reward-0123abcd"
    shutil.copytree(folder / "made/artifacts/reward-0123abcd", artifact)
    shutil.copytree(context.content, artifact, dirs_exist_ok=True)
    return {tokenizer.decode(pair.chosen, skip_special_tokens=True).strip() for pair in as_pairs(pairs)}, artifact


def external(folder: Path) -> StageInput:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["caretaker"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' <|im_end|>' }}{% endfor %}"
    )
    tiny_scorer(vocab_size=len(tokenizer), seed=3).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return StageInput(ref=f"path:{folder}", path=folder)


def test_a_model_from_outside_reads_the_text_by_its_own_template(folder: Path, tmp_path: Path) -> None:
    long = rewardbench_row(99, chosen="The keys are here. " * 60)
    write_rows(tmp_path / "pairs.jsonl", [*(rewardbench_row(number) for number in range(12)), long])
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=2, max_length=200)
    changes = {"inputs": {"reward": external(tmp_path / "outside")}}
    card = card_of(spec_of(folder, tmp_path, config, **changes))
    assert (card["num_pairs"], card["rows_too_long"]) == (12, 1)
    assert card["invariances"]["moved"] == []
    cut = replace(config, too_long=TooLongConfig(do=TooLong.cut))
    with pytest.raises(ModelError, match="reads text, so its rows cannot be cut"):
        card_of(spec_of(folder, tmp_path / "cut", cut, data_path=tmp_path / "pairs.jsonl", **changes))


def test_a_model_that_is_not_invariant_is_found_out_and_a_score_that_is_no_number_stops_the_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that grows with the row's place in its batch, as one read at a wrong token would."""
    honest = invariance.scalar_scores

    def broken(model: Any, rows: Any) -> torch.Tensor:
        scores = honest(model, rows)
        return scores + 0.1 * torch.arange(len(scores), device=scores.device)

    monkeypatch.setattr(invariance, "scalar_scores", broken)
    write_rows(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(6)])
    card = card_of(spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5)))
    assert card["invariances"]["moved"] == ["alone", "in another order", "padded on the left", "padded on the right"]
    assert any("scores change although they should not: alone" in sentence for sentence in card["warnings"])
    monkeypatch.setattr(invariance, "scalar_scores", lambda model, rows: honest(model, rows) * torch.nan)
    again = spec_of(folder, tmp_path / "nan", RewardCardConfig(), data_path=tmp_path / "pairs.jsonl")
    with pytest.raises(RewardError, match=r"gave nan for an answer to .*pairs\.jsonl:1"):
        card_of(again)
