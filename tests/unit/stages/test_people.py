"""The evaluation's judge ``people``: votes meet the arms' answers, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.config.evaluating import JudgeConfig, JudgeKind, PairConfig
from alignment.core.errors import DataError, StageError
from alignment.core.fingerprint import file_sha256
from alignment.data.records import HeldOutPrompt
from alignment.data.turns import Message
from alignment.evaluation.answer_pairs import pair_of
from alignment.evaluation.arms import Answer, Answered
from alignment.evaluation.bootstrap import Intervals
from alignment.evaluation.conclusions import conclusions
from alignment.records.evaluation import Metric
from alignment.records.votes import FILE, Vote, append_vote
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.judging import Judged, ScoredArms, _words, judge
from alignment.stages.evaluate.people import _extra_words
from alignment.stages.evaluate.votes_file import FIELD, votes_files
from alignment.training.context import StageContext
from tests.judged import ARMS, DPO, SFT, pair, vote
from tests.tiny import tiny_spec

NUMBERS = range(1, 13)
ROWS = [
    HeldOutPrompt(messages=(Message(role="user", content=f"Which number comes after {number - 1}?"),), id=f"p{number}")
    for number in NUMBERS
]
CONFIG = JudgeConfig(kind=JudgeKind.people)
LABELS = {SFT: "sft", DPO: "dpo"}


def answered(texts: Sequence[str], *, per_prompt: int = 1) -> Answered:
    answers = [Answer(ids=[2], text=text, ended=True) for text in texts]
    return Answered(answers=answers, logprobs=None, references=[None] * len(ROWS), seconds=0.0, per_prompt=per_prompt)


ANSWERS = {arm: answered([pair(number).answers[arm] for number in NUMBERS]) for arm in ARMS}


def context(folder: Path, votes: Sequence[Vote]) -> StageContext:
    """A stage that was planned with these votes."""
    spec = tiny_spec(folder, EvaluateConfig(judge=CONFIG))
    if votes:
        for about in votes:
            append_vote(folder / FILE, about)
        identity = {"files": {FIELD: file_sha256(folder / FILE)}}
        spec = replace(spec, extra_data={FIELD: folder / FILE}, identity=identity)
    return StageContext(spec=spec, rank=0, world_size=1)


def judged(stage: StageContext, config: JudgeConfig = CONFIG, **arms: Answered) -> Judged:
    every = {**ANSWERS, **{name if name == "base" else f"stage:{name}": arm for name, arm in arms.items()}}
    primary = ScoredArms(
        metric=Metric(name="brevity"),
        by_arm={"base": [0.0] * len(ROWS), SFT: [0.0] * len(ROWS), DPO: [1.0] * 6 + [0.0] * (len(ROWS) - 6)},
    )
    intervals = Intervals(samples=200, seed=0)
    return judge(config, stage, ROWS, every, {}, primary, None, reference=SFT, intervals=intervals)


def sentence(result: Judged) -> str:
    return conclusions(len(ROWS), None, [], result.table, LABELS)[0]


def test_votes_become_a_win_rate_with_their_agreement(tmp_path: Path) -> None:
    votes = [vote(pair(number)) for number in NUMBERS]
    votes += [vote(pair(number), SFT if number == 1 else DPO, annotator="bo") for number in (1, 2, 3)]
    result = judged(context(tmp_path, votes))
    assert result.table is not None
    assert (result.table.kind, result.table.num_prompts) == ("people", 12)
    (row,) = result.table.pairs
    assert (row.arm, row.against, row.verdict) == (DPO, SFT, "better")
    assert (row.wins, row.ties, row.losses, row.invalid) == (11, 1, 0, None)
    rate = result.win_rate(DPO, reference=SFT)
    assert rate is not None
    assert rate.mean == pytest.approx(11.5 / 12)
    assert row.metric_agreement == pytest.approx(5 / 12), "on prompts 2 to 6"
    assert row.people is not None
    assert row.people.alpha is not None
    assert "dpo wins 0.96 against sft (" in sentence(result)
    assert "12 of 12 prompts, 15 votes, annotators: 2, Krippendorff's α" in sentence(result)
    assert len(result.lines) == 15
    assert result.lines[0] == {
        "id": "p1",
        "row": 0,
        "arm": DPO,
        "against": SFT,
        "annotator": "ada",
        "shown_first": SFT,
        "preferred": DPO,
        "points": 1.0,
    }


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_no_judge_is_compared_with_the_metric_where_the_answers_are_identical(tmp_path: Path, per_prompt: int) -> None:
    """Ten of twelve prompts have identical answers, on which every judge agrees with every metric."""
    texts = {arm: [pair(number).answers[arm] if number <= 2 else "same" for number in NUMBERS] for arm in ARMS}
    arms = {
        arm: answered([text for text in of_arm for _ in range(per_prompt)], per_prompt=per_prompt)
        for arm, of_arm in texts.items()
    }
    scores = {SFT: [0.0] * len(ROWS), DPO: [1.0] + [0.0] * (len(ROWS) - 1)}
    rewards = {arm: [score for score in [0.0, -1.0 if arm == DPO else 0.0, *[0.0] * 10] for _ in range(per_prompt)]
               for arm in ARMS}  # fmt: skip
    result = judge(
        JudgeConfig(kind=JudgeKind.reward),
        context(tmp_path, []),
        ROWS,
        arms,
        rewards,
        ScoredArms(metric=Metric(name="brevity"), by_arm=scores),
        None,
        reference=SFT,
        intervals=Intervals(samples=200, seed=0),
    )
    assert result.table is not None
    (row,) = result.table.pairs
    assert (row.wins, row.ties, row.losses) == (0, 11, 1)
    assert (row.metric_agreement, row.metric_prompts) == (0.0, 2)


def test_every_pair_that_people_judged_is_in_the_table_unless_the_recipe_names_pairs(tmp_path: Path) -> None:
    """Without a word about pairs, a trained arm is compared with the reference alone."""
    prompted = answered([f"Well, {number}." for number in NUMBERS])
    about = [
        pair_of(pair(number).messages, {DPO: pair(number).answers[DPO], "base": f"Well, {number}."}, id="", task="")
        for number in NUMBERS
    ]
    stage = context(tmp_path, [vote(each, shown_first="base") for each in about])
    result = judged(stage, base=prompted)
    assert result.table is not None
    assert [(row.arm, row.against, row.wins) for row in result.table.pairs] == [(DPO, SFT, 0), ("base", DPO, 0)]
    assert result.table.pairs[1].losses == 12
    config = replace(CONFIG, pairs=[PairConfig(arm=DPO, against=SFT)])
    only = judged(stage, config, base=prompted).table
    assert only is not None
    assert [(row.arm, row.against) for row in only.pairs] == [(DPO, SFT)]


def test_votes_that_changed_since_the_plan_stop_the_stage(tmp_path: Path) -> None:
    stage = context(tmp_path, [vote(pair(number)) for number in NUMBERS])
    append_vote(tmp_path / FILE, vote(pair(1), annotator="bo"))
    with pytest.raises(StageError, match="the votes have changed since the run was planned"):
        judged(stage)


def planned(folder: Path, **settings: Any) -> dict[str, Path]:
    config = EvaluateConfig(judge=JudgeConfig(**{"kind": JudgeKind.people, **settings}))
    return dict(votes_files(config, folder / "evaluate"))


def test_the_votes_are_the_runs_own_unless_a_file_is_named(tmp_path: Path) -> None:
    own, other = tmp_path / "evaluate" / FILE, tmp_path / "other.jsonl"
    assert planned(tmp_path) == {}
    own.parent.mkdir()
    append_vote(own, vote(pair(1)))
    append_vote(other, vote(pair(2)))
    assert planned(tmp_path) == {FIELD: own}
    assert planned(tmp_path, votes=str(other)) == {FIELD: other}
    assert planned(tmp_path, kind=JudgeKind.metric) == {}
    with pytest.raises(DataError, match=r"stages\.evaluate\.judge\.votes: no file .*none\.jsonl"):
        planned(tmp_path, votes=str(tmp_path / "none.jsonl"))
    own.write_text("not a vote\n")
    with pytest.raises(DataError, match=r"votes\.jsonl:1: not JSON"):
        planned(tmp_path)


TEXTS = ["今天休息。", "Closed today.", "休息 today"]
WORDS = [4.0, 2.0, 3.0]


def test_votes_on_these_very_answers_count(tmp_path: Path) -> None:
    """The first of several; in whatever order the pair is named. Without any, nothing is concluded."""
    nothing = judged(context(tmp_path / "none", []))
    assert (nothing.lines, nothing.win_rate(DPO, reference=SFT)) == ([], None)
    assert "(people judged 0 of 12 prompts, but 10 are needed)" in sentence(nothing)
    stage = context(tmp_path, [vote(pair(number)) for number in NUMBERS])
    others = judged(stage, dpo=answered([f"Now {number}." for number in NUMBERS]))
    assert others.table is not None
    assert (others.table.pairs[0].wins, others.table.pairs[0].win_rate) == (0, None)
    assert "0 of 12 prompts, but 10 are needed; 12 votes are for other answers" in sentence(others)
    sft, dpo = (
        answered([text for number in NUMBERS for text in (pair(number).answers[arm], "more")], per_prompt=2)
        for arm in ARMS
    )
    reverse = replace(CONFIG, pairs=[PairConfig(arm=SFT, against=DPO)])
    for config, counts in ((CONFIG, (12, 0)), (reverse, (0, 12))):
        table = judged(stage, config, sft=sft, dpo=dpo).table
        assert table is not None
        assert (table.pairs[0].wins, table.pairs[0].losses) == counts


def test_lengths_of_answers_are_in_words_or_in_characters_of_scripts_without_spaces() -> None:
    answers = [Answer(ids=[5, 2], text=text, ended=True) for text in TEXTS]
    arm = Answered(answers=answers, logprobs=None, references=[None] * 3, seconds=1.0)
    for kind in (JudgeKind.endpoint, JudgeKind.metric):
        assert _words(arm, JudgeConfig(kind=kind), range(3)) == WORDS
    question = [{"role": "user", "content": "Open?"}]
    pairs = [pair_of(question, {"stage:dpo": text, "stage:sft": "No."}, id="", task="") for text in TEXTS]
    assert _extra_words(pairs, "stage:dpo", "stage:sft") == [words - 1 for words in WORDS]
