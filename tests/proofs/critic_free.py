"""One-token answers without a critic: RLOO, GRPO and Dr. GRPO reach the optimum of the bandit (tests/proofs/bandit.py).

With the KL in the reward the objective is that of PPO. At its optimum every answer to a prompt has the same reward less
the KL, so all advantages are zero there, GRPO's division by the deviation notwithstanding.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor

from alignment.config.model import AdapterConfig, Critic
from alignment.stages.ppo.config import Advantage, KlConfig, PpoConfig, PpoOptimConfig
from tests.proofs.bandit import BETA, Bandit, make_bandits, policy_claims, task_claims, trained
from tests.proofs.common import IN_DTYPES, SEEDS, Claim

UPDATES = 100
GROUP = 8
METHODS = (Advantage.rloo, Advantage.grpo, Advantage.dr_grpo)
NAMES = {Advantage.rloo: "RLOO", Advantage.grpo: "GRPO", Advantage.dr_grpo: "Dr. GRPO"}


def config_of(advantage: Advantage, adapter: AdapterConfig) -> PpoConfig:
    return PpoConfig(
        reward=None,
        adapter=adapter,
        advantage=advantage,
        critic=Critic.none,
        updates=UPDATES,
        completions_per_prompt=GROUP,
        max_new_tokens=1,
        missing_eos_penalty=0.0,  # every token is a whole answer here, whether it ends one or not
        kl=KlConfig(coefficient=BETA),
        save_every=UPDATES + 1,
        optim=PpoOptimConfig(lr=3e-3, batch_size=256, micro_batch_tokens=100_000),
    )


def run(folder: Path) -> list[Claim]:
    """Three methods, in full and by LoRA, the latter also in bfloat16; three seeds each."""
    claims = []
    for dtype, modes in IN_DTYPES:
        bandits = make_bandits(folder, dtype)
        claims += task_claims(bandits)
        for advantage, mode in itertools.product(METHODS, modes[:2]):
            config = config_of(advantage, mode.adapter)
            name = f"{NAMES[advantage]}, {mode.name}"
            claims += policy_claims(name, bandits, _policies(folder / dtype.value / name, bandits, config))
    return claims


def _policies(folder: Path, bandits: list[Bandit], config: PpoConfig) -> list[Tensor]:
    pairs = zip(SEEDS, bandits, strict=True)
    return [trained(folder / str(seed), bandit, config, seed)[0] for seed, bandit in pairs]
