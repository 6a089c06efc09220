"""Length costs what the papers say in the scores that PPO maximises, and has columns of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignment.stages.ppo.config import OverlongConfig
from alignment.training.rl.experience import Partition, Rollout
from alignment.training.rl.rollouts import Rollouts
from tests.oracles import length_penalties as oracle
from tests.unit.training.ppo_bench import END, Bench, TokenRewards

LONGEST, PER_TOKEN, OVERLONG, MISSING = 24, 0.25, OverlongConfig(buffer=16, weight=3.0), 0.5


def _rollouts(monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    made: list[Rollout] = []
    of_update = Rollouts.of_update

    def noted(self: Rollouts, *args: Any) -> tuple[Rollout, Partition]:
        rollout, cut = of_update(self, *args)
        made.append(rollout)
        return rollout, cut

    monkeypatch.setattr(Rollouts, "of_update", noted)
    return made


def test_length_is_subtracted_from_the_score_and_logged_by_itself(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _rollouts(monkeypatch)
    run = bench(
        updates=2,
        rewards=TokenRewards(lambda prompt, answer: float(sum(answer))),
        missing_eos_penalty=MISSING,
        length_penalty=PER_TOKEN,
        overlong=OVERLONG,
        max_new_tokens=LONGEST,
    )
    run.train()
    every = sorted(len(answer) for rollout in made for answer in rollout.answers)
    assert every[0] < LONGEST - OVERLONG.buffer < every[-1], "some answers should be short and some long"
    for rollout, line in zip(made, run.metrics(), strict=True):
        lengths = [len(answer) for answer in rollout.answers]
        overlong = [
            -OVERLONG.weight * oracle.overlong(length, longest=LONGEST, buffer=OVERLONG.buffer) for length in lengths
        ]
        per_token = [PER_TOKEN * length for length in lengths]
        missing = [0.0 if answer[-1] == END else MISSING for answer in rollout.answers]
        scores = [
            float(sum(answer)) - a - b - c
            for answer, a, b, c in zip(rollout.answers, overlong, per_token, missing, strict=True)
        ]
        count = len(lengths)
        assert line["penalty/length"] == pytest.approx(sum(per_token) / count, rel=1e-5)
        assert line["penalty/overlong"] == pytest.approx(sum(overlong) / count, rel=1e-5)
        assert line["objective/score"] == pytest.approx(sum(scores) / count, rel=1e-5)
        assert line["score/rule"] == pytest.approx(sum(sum(a) for a in rollout.answers) / count, rel=1e-5)
        assert 0.0 < line["penalty/overlong"] < OVERLONG.weight, "the penalty should be between its ends"


def test_without_penalties_there_are_no_columns_and_the_same_scores(bench: Callable[..., Bench]) -> None:
    plain, off = bench("plain", updates=1), bench("off", updates=1, overlong=OverlongConfig(weight=9.0))
    plain.train()
    off.train()
    assert not any(name.startswith("penalty/") for name in plain.metrics()[0])
    assert plain.metrics()[0]["objective/score"] == off.metrics()[0]["objective/score"]
