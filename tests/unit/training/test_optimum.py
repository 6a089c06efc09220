"""PPO finds optima that are known in closed form; ``make prove`` has the whole of it (tests/proofs)."""

from __future__ import annotations

from pathlib import Path

from tests.proofs import bandit, count
from tests.proofs.common import MODES

FULL, _, SHARED = MODES


def test_ppo_finds_the_optimum_of_one_token_answers(tmp_path: Path) -> None:
    task = bandit.make_bandit(tmp_path / "base", 0)
    assert task.best() - task.worth(task.reference) > bandit.POSSIBLE, "there should be something to gain"
    policy, _ = bandit.learned(tmp_path / "run", task, SHARED, updates=40, seed=0)
    assert 0.97 < bandit.gain(task, policy) <= 1.0 + 1e-9


def test_ppo_finds_out_which_of_five_tokens_earned_the_score(tmp_path: Path) -> None:
    policy, _ = count.learned(tmp_path, FULL, updates=40, seed=0)
    judgement = count.judged(policy)
    assert 0.97 < judgement.gain <= 1.0 + 1e-9
    assert judgement.outside < count.OUTSIDE
