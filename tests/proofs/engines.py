"""The bandit (tests/proofs/bandit.py) while a vLLM server samples, and while a server samples that is off.

vLLM's weights follow the policy after each of 100 updates, so an optimum is reached only if they do. The server that is
off (tests/engine_server.py) samples from q ∝ p^1.1 and says so: importance weights have to make up for it, and without
them the report has to warn. One seed with vLLM, because each run starts a server; three with the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from alignment.config.launch import Engine, RolloutSamplingConfig
from alignment.config.model import Dtype
from alignment.core.errors import ConfigError
from alignment.engines.engine_environment import interpreter
from alignment.stages.ppo.checks import CAPPED, GAP, STALENESS, WORRYING
from alignment.stages.ppo.config import Advantage, PpoConfig
from alignment.stages.ppo.kind import KIND
from tests.engine_server import Planted, engine_server
from tests.proofs import critic_free
from tests.proofs.bandit import Bandit, make_bandits, policy_claims, ppo_config, task_claims, trained
from tests.proofs.common import IN_DTYPES, MODES, SEEDS, Claim, Skipped, titled

HEAD_DIM = 32  # the smallest that vLLM's attention takes on a CPU
UPDATES = 100
SEED = 0
CAP = 2.0  # Yao et al. 2025 take 2 to 10
ROUNDING = 1e-4  # nats a token between two float32 passes of a tiny model
POWER = 1.1  # the planted 10 %
OFF = 0.97  # share of J* that importance weights must keep of an engine that is off
Lines = list[dict[str, Any]]


def run(folder: Path) -> list[Claim]:
    """PPO and RLOO, in full and by LoRA, with vLLM; one of them sampling ahead; RLOO with an engine that is off."""
    try:
        interpreter(None, package="vllm", where="ALIGNMENT_ENGINE_PYTHON")
    except ConfigError as error:
        raise Skipped(f"no environment with vLLM: {error.message}") from error
    bandits = make_bandits(folder, head_dim=HEAD_DIM)
    claims = task_claims(bandits)
    for mode in MODES[:2]:
        for name, config in (
            ("PPO", ppo_config(mode, UPDATES)),
            ("RLOO", critic_free.config_of(Advantage.rloo, mode.adapter)),
        ):
            claims += _vllm_claims(folder, bandits[SEED], f"{name}, {mode.name}, vLLM", config)
    ahead = ppo_config(MODES[1], UPDATES)
    claims += _vllm_claims(
        folder, bandits[SEED], "PPO, LoRA, vLLM an update ahead", ahead, max_staleness=1, importance_cap=CAP
    )
    return claims + [claim for dtype, _ in IN_DTYPES for claim in off_claims(folder / dtype.value, dtype)]


def _vllm_claims(folder: Path, bandit: Bandit, name: str, config: PpoConfig, **sampling: Any) -> list[Claim]:
    config = replace(config, sampling=RolloutSamplingConfig(engine=Engine.vllm, **sampling))
    policy, lines = trained(folder / name, bandit, config, SEED)
    ahead = config.sampling.max_staleness
    stale = [line[STALENESS] for line in lines]
    gaps = [line[GAP] for line in lines if line[STALENESS] == 0.0]
    return [
        *policy_claims(name, [bandit], [policy]),
        Claim(figure=f"{name}: updates", values=(float(len(lines)),), at_least=UPDATES),
        Claim(figure=f"{name}: largest mean gap of the same weights", values=(max(gaps),), at_most=ROUNDING),
        Claim(
            figure=f"{name}: staleness, mean of all updates but the first",
            values=(sum(stale[1:]) / len(stale[1:]),),
            at_least=ahead,
            at_most=ahead,
        ),
    ]


def off_claims(folder: Path, dtype: Dtype) -> list[Claim]:
    bandits = make_bandits(folder, dtype, head_dim=HEAD_DIM)
    capped = [_off(folder / "off-cap", bandit, seed, cap=CAP) for seed, bandit in zip(SEEDS, bandits, strict=True)]
    plain = [_off(folder / "off", bandit, seed, cap=None) for seed, bandit in zip(SEEDS, bandits, strict=True)]
    name = titled(f"RLOO, LoRA, an engine of p^{POWER:g}", dtype)
    shares = [
        tuple(bandit.worth(policy) / bandit.best() for bandit, (policy, _) in zip(bandits, runs, strict=True))
        for runs in (capped, plain)
    ]
    errors = [
        tuple(bandit.error(policy) for bandit, (policy, _) in zip(bandits, runs, strict=True))
        for runs in (capped, plain)
    ]
    gaps = tuple(lines[-1][GAP] for _, lines in capped)
    over = tuple(off / right for right, off in zip(*errors, strict=True))
    return [
        Claim(figure=f"{name}: mean gap of the last update", values=gaps, at_least=WORRYING),
        Claim(figure=f"{name}, capped at {CAP:g}: J(π) / J*", values=shares[0], at_least=OFF),
        Claim(figure=f"{name}, without a cap: J(π) / J*", values=shares[1]),
        Claim(figure=f"{name}: largest |π − π*| without a cap, over that with one", values=over),
        Claim(
            figure=f"{name}, capped at {CAP:g}: warnings of the report",
            values=tuple(_warnings(lines[-1]) for _, lines in capped),
            at_most=0,
        ),
        Claim(
            figure=f"{name}, without a cap: warnings of the report",
            values=tuple(_warnings(lines[-1]) for _, lines in plain),
            at_least=1,
        ),
    ]


def _off(folder: Path, bandit: Bandit, seed: int, *, cap: float | None) -> tuple[Tensor, Lines]:
    config = critic_free.config_of(Advantage.rloo, MODES[1].adapter)
    with engine_server(bandit.base, planted=Planted(power=POWER)) as engine:
        sampling = RolloutSamplingConfig(engine=Engine.vllm, url=engine.url, importance_cap=cap)
        policy, lines = trained(folder / str(seed), bandit, replace(config, sampling=sampling), seed)
    assert all((CAPPED in line) is (cap is not None) for line in lines)
    return policy, lines


def _warnings(line: Mapping[str, float]) -> float:
    metrics = {name: value for name, value in line.items() if name.startswith("engine/")}
    return float(sum("engine" in doubt for doubt in KIND.display.doubts(metrics)))
