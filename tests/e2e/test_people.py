"""People judge a run's evaluation; their votes give a win rate, and train a reward model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from alignment.commands.judge.ballots import Ballots, Choice
from alignment.evaluation.answer_pairs import pairs_of_samples
from alignment.records.evaluation import Evaluation, read_samples
from alignment.records.votes import read_votes
from tests.e2e.conftest import Align

ARMS = ("base+few-shot", "base")
EVALUATION = (
    *(f"~stages.{stage}" for stage in ("sft", "dpo", "ppo")),
    "stages.evaluate.arms=[base,base+few-shot]",
    "stages.evaluate.data.limit=12",
    "stages.evaluate.max_new_tokens=8",
    "stages.evaluate.bootstrap_samples=200",
    "stages.evaluate.few_shot.count=1",
    "stages.evaluate.reference=base",
    "stages.evaluate.reward=null",
    "stages.evaluate.judge={kind: people, pairs: [{arm: base+few-shot, against: base}]}",
    "stages.reward.init=base",
    "stages.reward.eval_fraction=0.0",
    "stages.reward.data.limit=null",
    "stages.reward.optim.max_steps=1",
    "stages.reward.optim.warmup_ratio=0",
    "stages.reward.optim.batch_size=4",
)


def test_votes_give_a_win_rate_and_train_a_reward_model(new_forked: Callable[[], Align]) -> None:
    align = replace(new_forked(), recipe="quickstart")
    align("run", *EVALUATION, "--stage", "evaluate")
    first = align.artifact("evaluate")
    assert "nothing can be concluded about base+few-shot and base" in Evaluation.read(first).conclusions[-1]
    votes = align.output / "runs/quickstart/evaluate/votes.jsonl"
    ballots = Ballots(votes, pairs_of_samples(read_samples(first), ARMS), ARMS)
    assert ballots.total == 12
    for annotator in ("ada", "bo"):
        for number in range(12):
            ballot = ballots.standing(annotator).ballot
            assert ballot is not None
            ballots.vote(annotator, ballot.pair.key, Choice.tie if number % 4 == 0 else Choice.first)
    printed = align("run", *EVALUATION, f"stages.reward.data.source=path:{votes}")
    assert "6 rows are left out: 'preferred' says that the answers are tied" in printed
    assert "may learn from resemble prompts of evaluate" in printed
    second = align.artifact("evaluate")
    assert second != first, "votes are part of what was asked for"
    assert list(read_samples(second)) == list(read_samples(first)), "the same answers are judged"
    judge = Evaluation.read(second).judge
    assert judge is not None
    (pair,) = judge.pairs
    assert pair.people is not None
    assert (pair.people.judged, pair.people.votes, pair.people.annotators) == (12, 24, 2)
    assert pair.win_rate is not None
    assert f"by the votes of people, base+few-shot wins {pair.win_rate.mean:.2f}" in printed
    preferences = [vote for vote in read_votes(votes) if vote.preferred in ARMS]
    manifest = json.loads((align.artifact("reward") / "manifest.json").read_text())
    assert manifest["metrics"]["rows"] == len(preferences) == 18
