"""Iterative DPO on the policy's own answers: a second round of sampling and learning improves on the first.

The story model (tests/proofs/stories.py) continues openings; vaderSentiment's compound score of 40 tokens, from −1
(dark) to 1 (bright), chooses the best and the worst of four continuations, and DPO learns from these pairs. Each round
samples from the policy of the round before, which is also its reference. All of it is the user's command. Rewards are
those of fresh samples at temperature 1 for openings that no round asks.
Rate, batch size and bounds were chosen before the first run.
"""

from __future__ import annotations

import json
from pathlib import Path

from alignment.records.evaluation import Evaluation
from alignment.records.run import RunRecord
from alignment.records.stages import Sampling
from tests.e2e.conftest import environment
from tests.e2e.forked import Forked
from tests.proofs.common import SEEDS, Claim
from tests.proofs.stories import OPENINGS, Stories

HELD_OUT = 8
"""Every eighth opening is for the evaluation."""
ROUND = 0.05  # gain of mean reward, at least, in each round
MOST_KL = 30.0  # nats a sequence of 40 tokens, between the second round's policy and the model
ARMS = ("base", "stage:dpo_1", "stage:dpo_2")

TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message['content'] }}\
{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"""
SCORER = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
judge = SentimentIntensityAnalyzer()
def sentiment(prompts, completions, rows):
    return [judge.polarity_scores(text)["compound"] for text in completions]
"""
RECIPE = """
defaults: [base, stage@stages.sample_1: sample, stage@stages.dpo_1: dpo, stage@stages.sample_2: sample,
           stage@stages.dpo_2: dpo, stage@stages.evaluate: evaluate, _self_]
summary: two rounds on stories
stages:
  sample_1: &sample
    policy: base
    reward: null
    scorers: [{source: "SCORER:sentiment"}]
    data: {source: "path:ASKED"}
    max_new_tokens: 40
    ended_only: false
  dpo_1: &dpo
    init: base
    adapter: {kind: full}
    data: {source: "stage:sample_1"}
    optim: {lr: 3e-4, batch_size: 32, epochs: 1}
  sample_2: {<<: *sample, policy: "stage:dpo_1"}
  dpo_2: {<<: *dpo, init: "stage:dpo_1", data: {source: "stage:sample_2"}}
  evaluate:
    arms: [base, "stage:dpo_1", "stage:dpo_2"]
    reference: base
    reward: null
    data: {source: "path:HELD_OUT"}
    metrics: [{name: sentiment, source: "SCORER:sentiment"}]
    answers: {per_prompt: 8, temperature: 1.0}
    max_new_tokens: 40
"""


def run(folder: Path) -> list[Claim]:
    """Two rounds, three seeds."""
    stories = Stories()
    recipe = _written(folder)
    forked = Forked(environment())
    try:
        for seed in SEEDS:
            options = [f"output={folder}", f"name=rounds-{seed}", f"seed={seed}", "model.dtype=float32"]
            options += [f"model.source=path:{stories.folder}", f"model.chat_template=path:{folder}/stories.jinja"]
            code, printed = forked.run(["run", str(recipe), *options])
            assert code == 0, printed
    finally:
        forked.close()
    rewards = [_rewards(folder, seed) for seed in SEEDS]
    kl = tuple(_evaluation(folder, seed).arms[-1].kl for seed in SEEDS)
    sampled = [_sampling(folder, seed) for seed in SEEDS]
    return [
        Claim(figure="mean reward of the model", values=tuple(before for before, _, _ in rewards), at_most=0.45),
        Claim(
            figure="gain of the first round",
            values=tuple(first - before for before, first, _ in rewards),
            at_least=ROUND,
        ),
        Claim(
            figure="gain of the second round over the first",
            values=tuple(second - first for _, first, second in rewards),
            at_least=ROUND,
        ),
        Claim(
            figure="mean reward of all that the second round samples less that of the first",
            values=tuple(second - first for first, second in sampled),
            at_least=ROUND,
        ),
        Claim(
            figure="KL of the second round's policy from the model, nats a sequence",
            values=tuple(interval.mean for interval in kl if interval is not None),
            at_most=MOST_KL,
        ),
    ]


def _written(folder: Path) -> Path:
    (folder / "stories.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "score.py").write_text(SCORER, encoding="utf-8")
    rows = [json.dumps({"messages": [{"role": "user", "content": opening}]}) + "\n" for opening in OPENINGS]
    asked = "".join(row for number, row in enumerate(rows) if number % HELD_OUT)
    files = {"SCORER": "score.py", "ASKED": "asked.jsonl", "HELD_OUT": "held_out.jsonl"}
    (folder / files["ASKED"]).write_text(asked, encoding="utf-8")
    (folder / files["HELD_OUT"]).write_text("".join(rows[::HELD_OUT]), encoding="utf-8")
    recipe = RECIPE
    for word, name in files.items():
        recipe = recipe.replace(word, str(folder / name))
    (folder / "rounds.yaml").write_text(recipe, encoding="utf-8")
    return folder / "rounds.yaml"


def _artifact(folder: Path, seed: int, stage: str) -> Path:
    return Path(RunRecord.read(folder / f"runs/rounds-{seed}").stages[stage].artifact)


def _evaluation(folder: Path, seed: int) -> Evaluation:
    return Evaluation.read(_artifact(folder, seed, "evaluate"))


def _rewards(folder: Path, seed: int) -> list[float]:
    arms = {arm.name: arm for arm in _evaluation(folder, seed).arms}
    return [arms[name].metrics["sentiment"].mean for name in ARMS]


def _sampling(folder: Path, seed: int) -> list[float]:
    records = (Sampling.read(_artifact(folder, seed, stage)) for stage in ("sample_1", "sample_2"))
    return [record.best_of[0].score for record in records]
