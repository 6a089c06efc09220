"""Answers of a policy as rows for other stages, as the worker makes them, by whatever scorers, and in parts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from alignment import worker
from alignment.config.data import DataConfig
from alignment.config.evaluating import ScorerEndpointConfig, ScorerGraderConfig
from alignment.config.model import AdapterConfig
from alignment.config.scoring import Combine, EnsembleConfig, MemberConfig, ScorerConfig, ServerConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import DataError, ModelError, RewardError, StageError
from alignment.data.reading import read_records
from alignment.data.records import Conversation, HeldOutPrompt, PreferencePair
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.tokens.tokenizer import load_tokenizer
from alignment.data.turns import Message
from alignment.job import StageSpec
from alignment.models.assembly.load import Lineage
from alignment.records.stages import Sampling
from alignment.stages import registry
from alignment.stages.sample import run
from alignment.stages.sample.kind import Select
from alignment.stages.shared import answer_sampling
from alignment.training.context import StageContext
from alignment.training.trackers.all_trackers import Trackers
from tests.generating import FINGERPRINT, LENGTH, asked, lines, sample_spec, sampled
from tests.judge_server import Response, listening, serving
from tests.oracles import best_of_n as oracle
from tests.oracles import ensembles
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
    folder, sent = tmp_path_factory.mktemp("sampled"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trackers, "table", lambda self, name, rows: sent.update({name: rows}))
        made = sampled(folder)
    (folder / "sent.json").write_text(json.dumps(sent))
    return made


def scorer(folder: Path, function: str) -> ScorerConfig:
    (folder / "score.py").write_text(SCORES)
    return ScorerConfig(source=f"{folder}/score.py:{function}")


def test_answers_are_kept_and_the_best_and_the_worst_become_pairs_that_are_counted(artifact: Path) -> None:
    samples = lines(artifact / "samples.jsonl")
    assert [(line["row"], line["number"]) for line in samples] == [(row, n) for row in range(9) for n in range(4)]
    for line in samples:
        assert line["score"] == pytest.approx(word_score(line["answer"]), abs=1e-6)
        assert line["scorers"] == {"length": line["score"]}
        assert 1 <= line["tokens"] <= 12
    assert {line["policy"] for line in samples} == {FINGERPRINT}
    assert len({line["seed"] for line in samples}) == 9
    assert len({line["answer"] for line in samples}) > 30
    assert json.loads((artifact.parents[1] / "sent.json").read_text()) == {"samples": samples}
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
    manifest = read_manifest(artifact)
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


def test_a_reward_model_scores_an_answer_after_its_own_prompt_and_the_best_is_learned(tmp_path: Path) -> None:
    """Beside transformers and PEFT alone, for answers of one token whose text no other token has."""
    spec = sample_spec(tmp_path)
    lineage = Lineage(source=BASE_SOURCE, base=tmp_path / "base", adapters=())
    reward = tiny_reward(tmp_path / "reward", AdapterConfig(rank=4), start=lineage, base_path=tmp_path / "base")
    settings = {"reward": "stage:reward", "scorers": [ScorerConfig()], "inputs": {**spec.inputs, "reward": reward}}
    made = sampled(tmp_path, max_new_tokens=1, select=Select.best, **settings)
    assert reward.path is not None
    (adapter,) = (reward.path / "adapters").iterdir()
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32, num_labels=1)
    model = PeftModel.from_pretrained(base, adapter).get_base_model().model
    head = load_file(reward.path / "head.safetensors")
    tokenizer = load_tokenizer(tmp_path / "base")
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    samples = lines(made / "samples.jsonl")
    known = [line for line in samples if texts.count(line["answer"]) == 1]
    assert len(known) > 9
    scores = []
    for line in known:
        prompt = prompt_ids(tokenizer, [Message(**turn) for turn in line["messages"]])
        with torch.no_grad():
            states = model(torch.tensor([[*prompt, texts.index(line["answer"])]])).last_hidden_state
        scores.append(float(states[0, -1] @ head["weight"][0] - head["offset"]))
    assert [line["score"] for line in known] == pytest.approx(scores, abs=1e-4)
    learned = {record.messages[-1].content for record in read_records(made / "rows.jsonl", Conversation, DataConfig())}
    groups = [[line for line in samples[row : row + 4] if not line["left_out"]] for row in range(0, 36, 4)]
    assert learned == {max(group, key=lambda line: line["score"])["answer"] for group in groups if group}


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


def run_parts(spec: Any) -> dict[str, bytes]:
    worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    return {name: (spec.artifact / name).read_bytes() for name in ("rows.jsonl", "samples.jsonl", "sampling.json")}


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_any_is_sampled(tmp_path: Path) -> None:
    """The policy has 4096 positions, and the last prompt is the longest."""
    longest = asked(2)
    longest["messages"][0]["content"] *= 300
    prompts = [asked(0), asked(1), longest]
    spec = sample_spec(tmp_path, prompts=prompts, batch_size=4, max_prompt_length=99999)
    with pytest.raises(ModelError, match="4096 positions"):
        worker._run(spec, StageContext(spec=spec, rank=0, world_size=1))
    assert not list((spec.work / "checkpoints").glob("part-*"))


class Stopped(BaseException):
    """The process ended."""


def made_parts(monkeypatch: pytest.MonkeyPatch, function: str, *, stops_after: int = 99) -> list[int]:
    """Parts that are made from now on, by ``generate`` or by ``score``; the stage stops after so many."""
    made: list[int] = []

    def counted(call: Any) -> Any:
        def once(*args: Any, **kwargs: Any) -> Any:
            if len(made) == stops_after:
                raise Stopped
            made.append(1)
            return call(*args, **kwargs)

        return once

    build = run.build_rewards

    def building(*args: Any) -> Any:
        rewards = build(*args)
        monkeypatch.setattr(rewards, "scores", counted(rewards.scores))
        return rewards

    if function == "generate":
        monkeypatch.setattr(answer_sampling, "generate", counted(answer_sampling.generate))
    else:
        monkeypatch.setattr(run, "build_rewards", building)
    return made


def stopped_in_the_middle(folder: Path, function: str, *, after: int) -> StageSpec:
    spec = sample_spec(folder)
    with pytest.MonkeyPatch.context() as patch:
        made_parts(patch, function, stops_after=after)
        with pytest.raises(Stopped):
            run_parts(spec)
    return spec


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return run_parts(sample_spec(tmp_path_factory.mktemp("straight")))


@pytest.mark.parametrize(("function", "after"), [("generate", 2), ("score", 1)])
def test_a_stage_that_is_stopped_in_the_middle_makes_the_same_bytes_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, bytes], function: str, after: int
) -> None:
    spec = stopped_in_the_middle(tmp_path, function, after=after)
    made = made_parts(monkeypatch, function)
    assert run_parts(spec) == straight
    assert len(made) == 3 - after


@pytest.mark.parametrize("damage", ['{"value": [[1]], "sha256": "0"}', "null", pytest.param("[" * 100_000, id="deep")])
def test_a_damaged_part_is_made_again_with_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    straight: dict[str, bytes],
    damage: str,
) -> None:
    spec = stopped_in_the_middle(tmp_path, "generate", after=2)
    first, _ = sorted((spec.work / "checkpoints").glob("part-*.json"))
    first.write_text(damage)
    made = made_parts(monkeypatch, "generate")
    assert run_parts(spec) == straight
    assert len(made) == 2
    assert [record.args[0] for record in caplog.records if "made again" in record.message] == [first]


def test_answers_do_not_depend_on_what_is_sampled_beside_them(tmp_path: Path, straight: dict[str, bytes]) -> None:
    """Nor do parts of another size stand for those that are missing."""
    stopped_in_the_middle(tmp_path, "generate", after=2)
    assert run_parts(sample_spec(tmp_path, batch_size=8)) == straight
    assert run_parts(sample_spec(tmp_path / "other", batch_size=5)) == straight
    another_seed = run_parts(sample_spec(tmp_path / "seed", seed=1))
    assert another_seed["samples.jsonl"] != straight["samples.jsonl"]


@pytest.mark.parametrize(("prompts", "size", "parts"), [(1, 2, 1), (31, 2, 16), (32, 4, 8), (500, 8, 63)])
def test_a_part_has_several_batches_if_enough_parts_remain_to_share(prompts: int, size: int, parts: int) -> None:
    """Four answers to each prompt, eight a batch."""
    config: Any = SimpleNamespace(batch_size=8, completions_per_prompt=4)
    asked_prompts: Any = SimpleNamespace(rows=list(range(prompts)))
    spans = answer_sampling.spans_of(config, asked_prompts)
    assert len(spans) == parts
    assert [span.stop - span.start for span in spans[:-1]] == [size] * (parts - 1)
    assert [row for span in spans for row in span] == list(range(prompts))


DOWN = Response(status=400, body="{}")


def by_words(body: dict[str, Any], _: int = 0) -> Response:
    """The rule ``length`` with three words, from outside."""
    scores = [{"id": item["id"], "score": word_score(item["answer"])} for item in body["items"]]
    return Response(body=json.dumps({"scores": scores}))


def word_score(text: str) -> float:
    return max(0.0, 1 - abs(len(text.split()) - 3) / 3)


def server(url: str, **changes: Any) -> ServerConfig:
    settings: dict[str, Any] = {"base_url": url, "model": "words", "retries": 0, "concurrency": 1, "batch_size": 5}
    return ServerConfig(**(settings | changes))


def test_a_server_chooses_the_rows_that_the_same_rule_would_and_is_asked_only_for_what_is_missing(
    tmp_path: Path,
) -> None:
    by_rule = sampled(tmp_path / "rule")
    with listening(lambda body, number: by_words(body) if number < 4 else DOWN) as first:
        scorer = ScorerConfig(source="server", server=server(first.url))
        with pytest.raises(RewardError, match="calls to the reward server at"):
            sampled(tmp_path / "served", scorers=[scorer])
    with listening(by_words) as second:
        by_server = sampled(tmp_path / "served", scorers=[ScorerConfig(source="server", server=server(second.url))])
    assert (by_server / "rows.jsonl").read_text() == (by_rule / "rows.jsonl").read_text()
    before = [json.dumps([i["messages"], i["answer"]]) for request in first.requests[:4] for i in request["items"]]
    after = [json.dumps([i["messages"], i["answer"]]) for request in second.requests for i in request["items"]]
    asked = {json.dumps([line["messages"], line["answer"]]) for line in lines(by_server / "samples.jsonl")}
    assert sorted(before + after) == sorted(asked), "each once"


def test_an_ensemble_and_a_grader_choose_rows(tmp_path: Path) -> None:
    def graded(prompt: str, _: int) -> Response:
        answer = prompt.rpartition("<<<answer>>>\n")[2].partition("\n<<<end of answer>>>")[0]
        return Response(text=f"So.\n[[{len(answer) % 10 + 1}]]")

    with serving(graded) as served:
        endpoint = ScorerEndpointConfig(base_url=served.url, model="m", retries=0)
        grade = MemberConfig(source="grade", grader=ScorerGraderConfig(endpoint=endpoint))
        length = MemberConfig(source="length", target=3)
        ensemble = EnsembleConfig(members=[length, grade], combine=Combine.mean_minus_std, std_weight=0.5)
        made = sampled(
            tmp_path, scorers=[ScorerConfig(source="ensemble", ensemble=ensemble, weight=2.0)], select=Select.best_worst
        )
    samples = lines(made / "samples.jsonl")
    for line in samples:
        members = [line["scorers"]["ensemble/length"], line["scorers"]["ensemble/grade"]]
        (bound,) = ensembles.combined([[member] for member in members], "mean_minus_std", weight=0.5)
        assert line["score"] == pytest.approx(2.0 * bound, rel=1e-5, abs=1e-5)
        assert members[0] == pytest.approx(word_score(line["answer"]), abs=1e-6)
        assert members[1] in range(1, 11)
    pairs = read_records(made / "rows.jsonl", PreferencePair, DataConfig())
    scores = {line["answer"]: line["score"] for line in samples}
    assert all(scores[pair.chosen] > scores[pair.rejected] for pair in pairs)
