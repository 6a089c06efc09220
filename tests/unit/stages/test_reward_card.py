"""A reward card as the worker makes it: on a tiny reward model, and on one from outside."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment import worker
from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.model import Dtype, ModelConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.config.too_long import TooLong, TooLongConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import DataError, ModelError, RewardError
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.evaluation import invariance
from alignment.job import StageInput, StageSpec
from alignment.models.assembly.load import Lineage
from alignment.pipeline.sweeps.reported import of_stage
from alignment.stages.reward.config import RewardConfig
from alignment.stages.reward_card.config import RewardCardConfig
from alignment.stages.shared.preference_pairs import read_pairs
from alignment.training.context import StageContext
from tests.pairs import as_pairs
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_reward, tiny_scorer, tiny_spec, tiny_tokenizer

LORA = AdapterConfig(rank=4)
RULE = ScoreSourceConfig(source="bundled:quickstart/house_style.py:style")


def rewardbench_row(number: int, **changes: Any) -> dict[str, Any]:
    """As in allenai/reward-bench, by its columns."""
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


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a reward model on it."""
    folder = tmp_path_factory.mktemp("judged")
    save_tiny_model(folder / "base")
    tiny_reward(folder / "made", LORA, start=lineage_in(folder), base_path=folder / "base", identity={"seed": 0})
    return folder


def lineage_in(folder: Path) -> Lineage:
    return Lineage(source=BASE_SOURCE, base=folder / "base", adapters=())


def spec_of(folder: Path, work: Path, config: RewardCardConfig, **changes: Any) -> StageSpec:
    artifact = folder / "made/artifacts/reward-0123abcd"
    fields: dict[str, Any] = {
        "base_path": folder / "base",
        "inputs": {"reward": StageInput(ref="stage:reward", path=artifact)},
        "data_path": work / "pairs.jsonl",
    }
    return tiny_spec(work, config, **{**fields, **changes})


def run(spec: StageSpec) -> dict[str, Any]:
    """The card that the worker publishes."""
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    card: dict[str, Any] = json.loads((spec.artifact / "card.json").read_text())
    return card


def lines(spec: StageSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (spec.artifact / "pairs.jsonl").read_text().splitlines()]


def test_a_file_like_rewardbench_s_gives_a_whole_card(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(24)])
    learned = write(tmp_path / "learned.jsonl", [rewardbench_row(number) for number in range(18, 40)])
    config = RewardCardConfig(bootstrap_samples=50, invariance_pairs=3, rule=RULE, num_worst=4)
    spec = spec_of(folder, tmp_path, config, extra_data={"learned": learned})
    card = run(spec)
    pairs = lines(spec)
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
    assert manifest is not None
    assert (manifest.kind, manifest.metrics["accuracy"]) == ("reward_card", card["accuracy"]["mean"])
    assert [name for name in manifest.metrics if name not in of_stage(RewardCardConfig())] == [], (
        "a sweep may ask for it"
    )
    assert {"accuracy/bag_of_words", "accuracy/longer_answer", "ece", "brier", "log_loss"} <= manifest.metrics.keys()


def test_a_function_of_yours_is_a_rule_and_names_the_pairs_that_it_cannot_judge(folder: Path, tmp_path: Path) -> None:
    rows = [rewardbench_row(number, words=9 + number) for number in range(4)]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    file = tmp_path / "score.py"
    file.write_text(
        "def near(prompts, completions, rows):\n"
        "    return [-abs(row['words'] - len(text.split())) for text, row in zip(completions, rows, strict=True)]\n"
    )
    rule = ScoreSourceConfig(source=f"{file}:near")
    spec = spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, rule=rule))
    right = [abs(len(r["chosen"].split()) - r["words"]) < abs(len(r["rejected"].split()) - r["words"]) for r in rows]
    assert 0 < sum(right) < 4
    assert run(spec)["rule"]["accuracy"]["mean"] == sum(right) / 4
    write(pairs, [rewardbench_row(0, words=9), rewardbench_row(1), rewardbench_row(2)])
    with pytest.raises(RewardError, match=f"; these rows have no 'words': {pairs}:2, {pairs}:3; none of its scores"):
        run(replace(spec, artifact=spec.artifact.with_name("again"), work=spec.work.with_name("again.work")))


def test_without_known_pairs_there_is_no_bag_of_words_and_all_are_judged(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [rewardbench_row(number, subset=None) for number in range(12)])
    spec = spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=50, invariance_pairs=0))
    spec = replace(spec, model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16))
    card = run(spec)
    assert (card["num_pairs"], card["learned"], card["invariances"], card["rule"]) == (12, None, None, None)
    assert [baseline["name"] for baseline in card["baselines"]] == ["longer answer"]
    assert card["subsets"] == []


def test_bfloat16_is_held_against_float32(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(4)])
    spec = spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5, invariance_pairs=16))
    card = run(replace(spec, model=ModelConfig(source=BASE_SOURCE, dtype=Dtype.bfloat16)))
    rounded, exact = (card["invariances"]["formats"][name]["changes"] for name in ("bfloat16", "float32"))
    assert card["invariances"]["num_pairs"] == 4
    assert card["invariances"]["moved"] == []
    assert rounded.keys() == exact.keys()
    largest = [max(change["largest"] for change in changes.values()) for changes in (rounded, exact)]
    assert all(change > 0 for change in largest)
    assert rounded != exact
    if not torch.cuda.is_available():  # a kernel may compute a row in the same way whatever stands beside it
        assert largest[1] < largest[0]


def test_pairs_that_were_learned_may_be_judged_and_are_then_counted(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(12)])
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, leave_out_learned=False)
    card = run(spec_of(folder, tmp_path, config, extra_data={"learned": file}))
    assert (card["num_pairs"], card["learned"]["judged_too"]) == (12, 12)
    assert card["warnings"][0].startswith("12 of the 12 pairs overlap with the model's training pairs")
    with pytest.raises(DataError, match="all 12 pairs have prompts that the reward model was trained on"):
        run(spec_of(folder, tmp_path / "again", RewardCardConfig(), data_path=file, extra_data={"learned": file}))


@pytest.mark.parametrize("too_long", [False, True])
def test_no_pair_is_judged_that_the_reward_stage_took(folder: Path, tmp_path: Path, too_long: bool) -> None:
    """A part is drawn by place among the rows that fit: a row too long, and it is another part."""
    rows = [rewardbench_row(number) for number in range(40)]
    judged = write(tmp_path / "pairs.jsonl", [*rows, *(rewardbench_row(number) for number in range(40, 60))])
    first = rewardbench_row(0, chosen="The keys are here. " * 60) if too_long else rows[0]
    file = write(tmp_path / "learned.jsonl", [first, *rows[1:]])
    taken, artifact = made_from_half(folder, tmp_path, file)
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=0, learned=DataConfig(fraction=0.5))
    inputs = {"reward": StageInput(ref="stage:reward", path=artifact)}
    spec = spec_of(folder, tmp_path, config, extra_data={"learned": file}, data_path=judged, inputs=inputs)
    card = run(spec)
    assert len(taken) == 20
    assert not taken & {pair["chosen"] for pair in lines(spec)}
    assert card["num_pairs"] == (20 if too_long else 40), "all of the file is left out where its part is not known"
    assert card["learned"]["part_known"] is not too_long
    assert (
        any("every pair of the file counts as a training pair" in warning for warning in card["warnings"]) is too_long
    )


def made_from_half(folder: Path, work: Path, file: Path) -> tuple[set[str], Path]:
    """The chosen answers that a reward stage learns from in half of the file's pairs, and its artifact."""
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
    """A model as a hub has them, with a tokenizer and a template of its own."""
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
    write(tmp_path / "pairs.jsonl", [*(rewardbench_row(number) for number in range(12)), long])
    config = RewardCardConfig(bootstrap_samples=5, invariance_pairs=2, max_length=200)
    changes = {"inputs": {"reward": external(tmp_path / "outside")}}
    card = run(spec_of(folder, tmp_path, config, **changes))
    assert (card["num_pairs"], card["rows_too_long"]) == (12, 1)
    assert card["invariances"]["moved"] == []
    cut = replace(config, too_long=TooLongConfig(do=TooLong.cut))
    with pytest.raises(ModelError, match="reads text, so its rows cannot be cut"):
        run(spec_of(folder, tmp_path / "cut", cut, data_path=tmp_path / "pairs.jsonl", **changes))


def test_no_pairs_and_rows_that_are_none_are_refused_by_place(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", [{"prompt": "When?", "completion": "Now."}])
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: 'chosen' is missing"):
        run(spec_of(folder, tmp_path, RewardCardConfig()))
    write(tmp_path / "pairs.jsonl", [])
    with pytest.raises(DataError, match="contains no rows"):
        run(spec_of(folder, tmp_path, RewardCardConfig()))


def test_a_model_that_is_not_invariant_is_found_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that grows with the row's place in its batch, as one read at a wrong token would."""
    honest = invariance.scalar_scores

    def broken(model: Any, rows: Any) -> torch.Tensor:
        scores = honest(model, rows)
        return scores + 0.1 * torch.arange(len(scores), device=scores.device)

    monkeypatch.setattr(invariance, "scalar_scores", broken)
    write(tmp_path / "pairs.jsonl", [rewardbench_row(number) for number in range(6)])
    card = run(spec_of(folder, tmp_path, RewardCardConfig(bootstrap_samples=5)))
    assert card["invariances"]["moved"] == ["alone", "in another order", "padded on the left", "padded on the right"]
    assert any("scores change although they should not: alone" in sentence for sentence in card["warnings"])


def test_a_score_that_is_no_number_stops_the_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(model: Any, rows: Any) -> torch.Tensor:
        return torch.full((len(rows.lengths),), torch.nan)

    monkeypatch.setattr(invariance, "scalar_scores", nan)
    write(tmp_path / "pairs.jsonl", [rewardbench_row(1)])
    with pytest.raises(RewardError, match=r"gave nan for an answer to .*pairs\.jsonl:1"):
        run(spec_of(folder, tmp_path, RewardCardConfig()))
