"""DPO on Bradley–Terry pairs from the bandit's rewards reaches PPO's policy (Rafailov et al. 2023, eq. 4).

Labels drawn at random would leave far more noise than the bound allows: at β = ½ an error of .01 takes about a hundred
thousand pairs for each two tokens. So every two tokens of a prompt stand in the data in the exact proportion in which
a judge prefers one to the other, w_a : w_b. Which pairs are met how often does not move the minimum of the loss, only
the proportion does, so nothing else depends on their being enumerated rather than drawn from the reference.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from alignment.config.model import AdapterConfig
from alignment.config.optim import OptimConfig, Schedule
from alignment.models.assembly.load import Lineage
from alignment.stages.dpo import run as dpo
from alignment.stages.dpo.kind import DpoConfig
from alignment.training.context import StageContext
from alignment.training.session import train
from tests.pairs import TokenizedPair, as_table
from tests.proofs.bandit import BETA, PROMPTS, VOCABULARY, Bandit, make_bandits, policy_claims, task_claims
from tests.proofs.common import MODES, SEEDS, Claim
from tests.tiny import BASE_SOURCE, tiny_spec, tiny_tokenizer

STEPS = 120


def pairs_of(bandit: Bandit) -> list[TokenizedPair]:
    return [
        TokenizedPair(prompt=list(prompt), chosen=[a], rejected=[b])
        for prompt, strengths in zip(PROMPTS, bandit.strengths.tolist(), strict=True)
        for a in range(VOCABULARY)
        for b in range(VOCABULARY)
        if a != b
        for _ in range(strengths[a])
    ]


def learned(folder: Path, bandit: Bandit, adapter: AdapterConfig, pairs: list[TokenizedPair], *, seed: int) -> Tensor:
    """``[prompts, tokens]`` log-probabilities after DPO on all ``pairs`` at once."""
    config = DpoConfig(
        adapter=adapter,
        beta=BETA,
        optim=OptimConfig(
            lr=1e-2, batch_size=len(pairs), micro_batch_tokens=100_000, epochs=STEPS, schedule=Schedule.cosine
        ),
        log_every=STEPS,
        save_every=STEPS,
    )
    context = StageContext(spec=tiny_spec(folder, config, base_path=bandit.base, seed=seed), rank=0, world_size=1)
    start = Lineage(source=BASE_SOURCE, base=bandit.base, adapters=())
    trainer = dpo._trainer(config, context, start, tiny_tokenizer(), as_table(pairs))
    dpo.check_start(trainer)
    train(trainer, context, headline="loss")
    return bandit.policy_of(trainer.model)


def run(folder: Path) -> list[Claim]:
    """All weights and LoRA, three seeds each."""
    bandits = make_bandits(folder)
    claims = task_claims(bandits)
    for mode in MODES[:2]:  # DPO has no critic
        policies = [
            learned(folder / f"{mode.name}-{seed}", bandit, mode.adapter, pairs_of(bandit), seed=seed)
            for seed, bandit in zip(SEEDS, bandits, strict=True)
        ]
        claims += policy_claims(mode.name, bandits, policies)
    return claims
