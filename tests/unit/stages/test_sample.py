"""Answers of a policy as rows for other stages, as the worker makes them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.scoring import ScorerConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import DataError, StageError
from alignment.data.reading import read_records
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.models.assembly.load import Lineage
from alignment.records.sampling import Sampling
from alignment.stages import registry
from alignment.stages.sample.config import Select
from alignment.training.trackers.all_trackers import Trackers
from tests.oracles import best_of_n as oracle
from tests.sampled import FINGERPRINT, LENGTH, asked, lines, sample_spec, sampled
from tests.tiny import BASE_SOURCE, tiny_reward

TIED = "the scorers gave all answers to a prompt the same score"
SCORES = '''
import zlib
def table(prompts, completions, rows):
    """A number for each text, of any spaces around it; nothing is worth least."""
    texts = [text.strip() for text in completions]
    return [zlib.crc32(text.encode()) % 997 / 997 if text else -1.0 for text in texts]
def same(prompts, completions, rows):
    return [0.5] * len(rows)
'''


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of the best and the worst of four answers."""
    return sampled(tmp_path_factory.mktemp("sampled"))


def scorer(folder: Path, function: str) -> ScorerConfig:
    (folder / "score.py").write_text(SCORES)
    return ScorerConfig(source=f"{folder}/score.py:{function}")


def test_every_answer_is_kept_with_its_score_its_seed_and_its_policy(artifact: Path) -> None:
    samples = lines(artifact / "samples.jsonl")
    assert [(line["row"], line["number"]) for line in samples] == [(row, n) for row in range(9) for n in range(4)]
    for line in samples:
        words = len(line["answer"].split())
        assert line["score"] == pytest.approx(min(words, 6 - words) / 3 if words < 6 else 0.0, abs=1e-6)
        assert line["scorers"] == {"length": line["score"]}
        assert 1 <= line["tokens"] <= 12
    assert {line["policy"] for line in samples} == {FINGERPRINT}
    assert len({line["seed"] for line in samples}) == 9
    assert len({line["answer"] for line in samples}) > 30


def test_trackers_get_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}
    monkeypatch.setattr(Trackers, "table", lambda self, name, rows: sent.update({name: rows}))
    made = sampled(tmp_path, data=DataConfig(source="path:prompts", limit=2))
    assert len(sent["samples"]) == 8
    assert sent == {"samples": lines(made / "samples.jsonl")}


def test_pairs_are_the_best_and_the_worst_answer_to_a_prompt_and_dpo_reads_them(artifact: Path) -> None:
    samples = lines(artifact / "samples.jsonl")
    pairs = read_records(artifact / "rows.jsonl", PreferencePair, DataConfig())
    assert len(pairs) == 9
    for row, pair in enumerate(pairs):
        answers = samples[4 * row : 4 * row + 4]
        scores = {line["answer"]: line["score"] for line in answers}
        assert scores[pair.chosen] == max(scores.values())
        assert scores[pair.rejected] == min(scores.values())
        assert [turn.as_dict() for turn in pair.messages] == answers[0]["messages"]
        used = {line["used_as"]: line["answer"] for line in answers if line["used_as"]}
        assert used == {"chosen": pair.chosen, "rejected": pair.rejected}


def test_the_manifest_counts_rows_and_says_what_the_best_is_worth(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest is not None
    assert manifest.kind == "rows"
    scores = [line["score"] for line in lines(artifact / "samples.jsonl")]
    groups = [scores[first : first + 4] for first in range(0, 36, 4)]
    counts = {name: manifest.metrics[name] for name in ("prompts", "answers", "rows", "prompts_evaluated")}
    assert counts == {"prompts": 9, "answers": 36, "rows": 9, "prompts_evaluated": 0}
    assert manifest.metrics["score"] == pytest.approx(sum(scores) / 36)
    assert manifest.metrics["best_score"] == pytest.approx(sum(map(max, groups)) / 9)
    two = json.loads((artifact / "sampling.json").read_text())["best_of"][1]
    assert two["answers"] == 2
    assert two["score"] == pytest.approx(sum(oracle.mean_of_best(group, 2) for group in groups) / 9)
    assert two["kl_bound"] == pytest.approx(math.log(2) - 0.5)


def test_the_best_of_n_has_the_reward_and_the_divergence_of_the_exact_distribution(tmp_path: Path) -> None:
    """One-token answers, whose distribution can be enumerated; bounds of four standard errors."""
    prompts, n, temperature = 150, 8, 0.8
    made = sampled(
        tmp_path,
        prompts=[asked(number) for number in range(prompts)],
        data=DataConfig(source="path:prompts"),
        scorers=[scorer(tmp_path, "table")],
        select=Select.best,
        completions_per_prompt=n,
        temperature=temperature,
        max_new_tokens=1,
        batch_size=400,
    )
    tokenizer = load_tokenizer(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    texts = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in range(len(tokenizer))]
    by_text = dict(zip(texts, _scored(tmp_path, texts), strict=True))
    chosen = {row["id"]: row["messages"][-1]["content"].strip() for row in lines(made / "rows.jsonl")}
    answers: dict[str, list[str]] = {}
    for line in lines(made / "samples.jsonl"):
        answers.setdefault(line["id"], []).append(line["answer"].strip())
    exact = _Mean(), _Mean(), _Mean(), _Mean()
    ratios, logprobs = [], []
    for number in range(prompts):
        row = asked(number)
        ids = prompt_ids(tokenizer, [Message(**row["messages"][0])])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        policy: dict[str, float] = {}
        for text, probability in zip(texts, (logits / temperature).softmax(-1).tolist(), strict=True):
            policy[text] = policy.get(text, 0.0) + probability
        best = oracle.distribution_of_best(policy, by_text, n)
        ratio = oracle.log_ratios(best, policy)
        assert oracle.mean(best, ratio) <= math.log(n) - (n - 1) / n
        exact[0].add(policy, by_text, draws=n)
        exact[1].add(best, by_text)
        exact[2].add(best, ratio)
        ratios.append(ratio[chosen[row["id"]]])
        logprob = {text: math.log(probability) for text, probability in policy.items()}
        exact[3].add(policy, logprob, draws=n)
        logprobs += [logprob[text] for text in answers[row["id"]]]
    record = json.loads((made / "sampling.json").read_text())
    exact[0].agrees_with(record["best_of"][0]["score"])
    exact[1].agrees_with(record["best_of"][-1]["score"])
    exact[2].agrees_with(sum(ratios) / prompts)
    exact[3].agrees_with(sum(logprobs) / len(logprobs))


class _Mean:
    """The mean over prompts of expectations, and the deviation of its estimate from samples."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._variance = 0.0

    def add(self, distribution: dict[str, float], value: dict[str, float], *, draws: int = 1) -> None:
        self._means.append(oracle.mean(distribution, value))
        self._variance += oracle.deviation(distribution, value) ** 2 / draws

    def agrees_with(self, estimate: float) -> None:
        error = math.sqrt(self._variance) / len(self._means)
        assert abs(estimate - sum(self._means) / len(self._means)) < 4 * error
        assert error < 0.1, "too few prompts to see anything"


def _scored(folder: Path, texts: list[str]) -> list[float]:
    space: dict[str, Any] = {}
    exec((folder / "score.py").read_text(), space)
    scores: list[float] = space["table"]([], texts, [])
    return scores


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_prompts_that_are_evaluated_or_repeated_are_left_out_and_listed(tmp_path: Path) -> None:
    evaluated = tmp_path / "heldout.jsonl"
    evaluated.write_text(json.dumps(asked(1)) + "\n")
    made = sampled(
        tmp_path,
        prompts=[asked(0), asked(1), asked(2), asked(0)],
        leave_out=[DataConfig(source="path:heldout")],
        extra_data={"leave_out[0]": evaluated},
    )
    assert {line["id"] for line in lines(made / "samples.jsonl")} == {"q0", "q2"}
    counts = json.loads((made / "sampling.json").read_text())
    assert (counts["prompts"], counts["prompts_evaluated"], counts["prompts_repeated"]) == (2, 1, 1)
    listed = {line["where"].rpartition(":")[2]: line["reason"] for line in lines(made / "left_out.jsonl")}
    assert listed == {
        "2": f"it has 100% of the eight-word sequences of {evaluated}:1",
        "4": "its prompt repeats an earlier row",
    }
    assert read_records(evaluated, HeldOutPrompt, DataConfig())


def test_a_stage_whose_prompts_are_all_evaluated_ends_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "heldout.jsonl").write_text(json.dumps(asked(0)) + "\n")
    settings = {"leave_out": [DataConfig(source="x")], "extra_data": {"leave_out[0]": tmp_path / "heldout.jsonl"}}
    with pytest.raises(DataError, match=r"no prompt is left of 1: 1 are also evaluated, 0 are repeated") as caught:
        sampled(tmp_path, prompts=[asked(0)], **settings)
    assert caught.value.where == "stages.sample.data"


def test_answers_without_an_end_are_left_out_unless_they_may_be_learned(tmp_path: Path) -> None:
    """At a length at which some answers of the tiny policy end and others do not."""
    settings = {"max_new_tokens": 80, "select": Select.labels, "threshold": 0.0, "completions_per_prompt": 6}
    made = sampled(tmp_path / "ended", ended_only=True, **settings)
    samples = lines(made / "samples.jsonl")
    without = [line for line in samples if not line["ended"]]
    assert 0 < len(without) < len(samples)
    assert {line["left_out"] for line in without} <= {"no end", "empty"}
    assert all(line["tokens"] == 80 for line in without)
    counts = json.loads((made / "sampling.json").read_text())
    assert counts["answers_without_end"] == sum(line["left_out"] == "no end" for line in samples)
    assert len(lines(made / "rows.jsonl")) == sum(not line["left_out"] for line in samples)
    every = sampled(tmp_path / "all", ended_only=False, **settings)
    assert len(lines(every / "rows.jsonl")) > len(lines(made / "rows.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({}, f"{TIED}, so none is better than another", "use scorers that distinguish the answers"),
        ({"select": Select.labels}, TIED, "use scorers that distinguish the answers"),
        (
            {"select": Select.best, "threshold": 0.75},
            r"no answer reaches the threshold 0\.75; the best one scores 0\.5",
            "lower threshold",
        ),
        (
            {"scorers": [LENGTH], "min_margin": 2.0},
            r"no two answers to a prompt differ by min_margin, 2; the largest margin is 0\.",
            "lower min_margin",
        ),
        ({"temperature": 1e-4}, "no prompt has two different answers", "raise temperature or completions_per_prompt"),
        ({"ended_only": True}, r"none of the 8 answers can be used \(no end: 8\)", "raise max_new_tokens, or set"),
    ],
)
def test_answers_that_give_no_row_end_the_stage_with_the_reason_and_a_remedy(
    tmp_path: Path, changes: dict[str, Any], message: str, remedy: str
) -> None:
    settings = {"scorers": [scorer(tmp_path, "same")], "max_new_tokens": 6, **changes}
    with pytest.raises(StageError, match=message) as caught:
        sampled(tmp_path, prompts=[asked(0), asked(1)], **settings)
    assert caught.value.where == "stages.sample"
    assert caught.value.remedy.startswith(remedy)
    assert caught.value.exit_code == 5


# ---- scorers ---------------------------------------------------------------------------------------------------------


def test_a_total_is_the_weighted_sum_over_scorers_normalised_over_all_answers(tmp_path: Path) -> None:
    table = scorer(tmp_path, "table")
    table.weight, table.normalize = -2.0, True
    samples = lines(sampled(tmp_path, scorers=[LENGTH, table]) / "samples.jsonl")
    raw = torch.tensor([line["scorers"]["table"] for line in samples], dtype=torch.float64)
    normalised = (raw - raw.mean()) / raw.std(correction=0)
    length = torch.tensor([line["scorers"]["length"] for line in samples])
    total = torch.tensor([line["score"] for line in samples])
    assert torch.allclose(total, length - 2.0 * normalised.float(), atol=1e-5)


def test_a_reward_model_of_the_run_chooses_the_best_answer_and_sft_learns_it(tmp_path: Path) -> None:
    spec = sample_spec(tmp_path)
    lineage = Lineage(source=BASE_SOURCE, base=tmp_path / "base", adapters=())
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=lineage, base_path=tmp_path / "base")
    made = sampled(
        tmp_path,
        reward="stage:reward",
        scorers=[ScorerConfig()],
        select=Select.best,
        inputs={**spec.inputs, "reward": reward},
    )
    samples = lines(made / "samples.jsonl")
    conversations = read_records(made / "rows.jsonl", Conversation, DataConfig())
    assert len({line["score"] for line in samples}) > 30
    for row, conversation in enumerate(conversations):
        group = samples[4 * row : 4 * row + 4]
        best = max(group, key=lambda line: line["score"])
        assert conversation.messages[-1] == Message(role="assistant", content=best["answer"])


def test_a_reward_model_scores_an_answer_after_its_own_prompt(tmp_path: Path) -> None:
    """Beside transformers and PEFT alone, for answers of one token whose text no other token has."""
    spec = sample_spec(tmp_path)
    lineage = Lineage(source=BASE_SOURCE, base=tmp_path / "base", adapters=())
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=lineage, base_path=tmp_path / "base")
    settings = {"reward": "stage:reward", "scorers": [ScorerConfig()], "inputs": {**spec.inputs, "reward": reward}}
    made = sampled(tmp_path, max_new_tokens=1, **settings)
    assert reward.path is not None
    (adapter,) = (reward.path / "adapters").iterdir()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32, num_labels=1)
    model = PeftModel.from_pretrained(base, adapter).get_base_model().model
    head = load_file(reward.path / "head.safetensors")
    tokenizer = load_tokenizer(tmp_path / "base")
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    known = [line for line in lines(made / "samples.jsonl") if texts.count(line["answer"]) == 1]
    assert len(known) > 9
    prompts = [prompt_ids(tokenizer, [Message(**turn) for turn in line["messages"]]) for line in known]
    scores = []
    for prompt, line in zip(prompts, known, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([[*prompt, texts.index(line["answer"])]])).last_hidden_state
        scores.append(float(states[0, -1] @ head["weight"][0] - head["offset"]))
    assert [line["score"] for line in known] == pytest.approx(scores, abs=1e-4)


def test_labelled_rows_are_read_as_such_and_sft_learns_the_good_ones(tmp_path: Path) -> None:
    made = sampled(tmp_path, select=Select.labels)
    rows = lines(made / "rows.jsonl")
    good = [row for row in rows if row["label"]]
    assert 0 < len(good) < len(rows)
    learned = read_records(made / "rows.jsonl", Conversation, DataConfig())
    assert [conversation.messages[-1].content for conversation in learned] == [row["completion"] for row in good]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_a_result_is_shown_with_what_was_left_out_and_what_the_best_is_worth(artifact: Path) -> None:
    record = replace(Sampling.read(artifact), answers_without_end=3, prompts_evaluated=2)
    (line,) = registry.lines_of("sample", artifact)
    assert line == f"{artifact.name}: 9 rows (best_worst) of 36 answers to 9 prompts"
    shown = artifact.parent / "shown"
    shown.mkdir()
    record.write(shown)
    (line,) = registry.lines_of("sample", shown)
    assert line.endswith("; left out: 2 prompts that are also evaluated, 3 answers without an end")
    (table,) = registry.tables_of("sample", shown)
    assert [label for label, _ in table.rows] == ["best of 1", "best of 2", "best of 4"]
    assert [cells[1].text for _, cells in table.rows] == ["0.00", "0.19", "0.64"]
    assert table.rows[2][1][0].text == f"{record.best_of[2].score:.3f}"


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"prompts": 4.0, "answers": 16.0, "prompts_tied": 4.0}, "all answers to each prompt had the same score"),
        ({"prompts": 4.0, "answers": 16.0, "answers_repeated": 9.0}, "more than half of the answers repeat another"),
        ({"prompts": 4.0, "answers": 16.0, "prompts_tied": 3.0, "answers_repeated": 8.0}, None),
    ],
)
def test_a_result_with_little_to_choose_from_is_doubted(metrics: dict[str, float], words: str | None) -> None:
    doubts = registry.doubts("sample", metrics)
    assert [doubt.startswith(words or "") for doubt in doubts] == ([True] if words else [])
