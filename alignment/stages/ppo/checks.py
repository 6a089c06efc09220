"""What a plan checks of PPO's settings: critic, batches, engine and scorers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alignment.config.faults import Fault, unread_notes
from alignment.config.launch import Engine, RolloutSamplingConfig
from alignment.config.model import AdapterKind, Critic
from alignment.config.scoring import ScoreSourceConfig
from alignment.engines.server_process import RANKS
from alignment.rewards.scorer_sources import in_list, with_members
from alignment.stages.base import Curve, Planned
from alignment.stages.ppo.config import Advantage, PpoConfig, PpoOptimConfig
from alignment.stages.shared.kind_answers import curve, sampling_faults

READ_WITH_A_CRITIC = (
    "critic_warmup",
    "prompt_baseline",
    "gamma",
    "gae_lambda",
    "value_clip",
    "value_coefficient",
    "whiten_rewards",
)
"""Settings that only ``Advantage.gae`` reads."""


def critic_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    """Why the advantage of the stage at ``where`` does not go with its critic, and which settings have no effect."""
    if config.advantage is Advantage.gae:
        if config.critic is Critic.none:
            message = "'none', but advantage 'gae' needs a value model; use 'separate' or 'shared', or advantage=rloo"
            yield Fault(where=f"{where}.critic", message=message)
        reader = "only an advantage that compares answers ('rloo', 'grpo', 'dr_grpo')"
        yield from unread_notes(config, PpoConfig(), ("drop_ties",), where, reader)
        return
    if config.critic is not Critic.none:
        message = f"{config.critic.value!r}, but advantage {config.advantage.value!r} has no value model; choose 'none'"
        yield Fault(where=f"{where}.critic", message=message)
    reader = "only advantage 'gae'"
    yield from unread_notes(config, PpoConfig(), READ_WITH_A_CRITIC, where, reader)
    yield from unread_notes(config.optim, PpoOptimConfig(), ("critic_lr",), f"{where}.optim", reader)


def size_faults(config: PpoConfig, processes: int, where: str) -> Iterator[Fault]:
    """Why the stage at ``where`` cannot sample and learn on this number of processes. All answers to a prompt stay on
    one process, for sampling and for learning."""
    episodes, group = config.optim.batch_size, config.completions_per_prompt
    if group == 1 and config.advantage is not Advantage.gae:  # nothing can be compared
        message = f"1, but advantage {config.advantage.value!r} compares the answers to a prompt; choose 2 or more"
        yield Fault(where=f"{where}.completions_per_prompt", message=message)
    elif group == 1 and config.prompt_baseline:
        message = "the baseline is the mean over other completions; set completions_per_prompt to 2 or more"
        yield Fault(where=f"{where}.prompt_baseline", message=message)
    if config.guard.every and config.guard.prompts < processes:
        message = f"{config.guard.prompts} prompts are too few for {processes} processes; choose {processes} or more"
        yield Fault(where=f"{where}.guard.prompts", message=message)
    prompts, rest = divmod(episodes, group)
    if rest:
        message = (
            f"{episodes} episodes cannot be divided into groups of {group} completions; choose a divisor of "
            f"optim.batch_size"
        )
        yield Fault(where=f"{where}.completions_per_prompt", message=message)
        return  # the number of prompts is not defined
    if prompts % processes:
        message = (
            f"{prompts} prompts do not divide among {processes} processes; choose a multiple of {processes * group}"
        )
        yield Fault(where=f"{where}.optim.batch_size", message=message)
    elif prompts // config.num_minibatches < processes:
        least = processes * config.num_minibatches * group
        message = (
            f"{config.num_minibatches} minibatches of {prompts} prompts leave {prompts // config.num_minibatches} for "
            f"{processes} processes; choose optim.batch_size={least} or more, or fewer minibatches"
        )
        yield Fault(where=f"{where}.num_minibatches", message=message)


GAP, LARGEST_GAP, BEYOND = "engine/gap", "engine/gap_max", "engine/beyond"
"""The mean and the largest difference of a log-probability to the engine's, and the share beyond the bound."""
IMPORTANCE, CAPPED, STALENESS = "engine/importance", "engine/capped", "engine/staleness"
"""The mean importance weight, the share of weights at the cap, and the age in updates of the policy that sampled."""
OF_CAP = (IMPORTANCE, CAPPED)
"""Those that only an importance cap gives."""
OF_ENGINE = (GAP, LARGEST_GAP, BEYOND, *OF_CAP)
"""Those of the last update that are reported."""
WORRYING = 0.05
"""A mean difference in nats per token; rounding in bfloat16 made .039 on a model of 135 million parameters."""

_UNSERVED = {
    AdapterKind.dora: "vLLM does not support DoRA",
    AdapterKind.prefix: "vLLM does not support prefix adapters",
}


def engine_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    """Settings of the engine that cannot be right, or that it does not support."""
    sampling, field = config.sampling, f"{where}.sampling"
    yield from sampling_faults(sampling, field)
    if sampling.engine is Engine.own:
        own = ("importance_cap", "max_staleness", "gap_bound")
        yield from unread_notes(sampling, RolloutSamplingConfig(), own, field, "only engine 'vllm'")
        return
    if reason := _UNSERVED.get(config.adapter.kind):
        message = f"'vllm', but {reason}; use adapter=lora or adapter=full, or {field}.engine=own"
        yield Fault(where=f"{field}.engine", message=message)
    if config.adapter.kind is not AdapterKind.full and config.adapter.modules_to_save:
        message = f"'vllm', which does not support modules_to_save; leave that out, or use {field}.engine=own"
        yield Fault(where=f"{field}.engine", message=message)
    if config.adapter.kind is not AdapterKind.full and config.adapter.rank > RANKS[-1]:
        message = f"{config.adapter.rank}, but vLLM supports at most {RANKS[-1]}; lower it, or use {field}.engine=own"
        yield Fault(where=f"{where}.adapter.rank", message=message)
    if sampling.max_staleness and sampling.importance_cap is None:
        message = "1, so answers come from an earlier policy, which nothing corrects; set importance_cap, such as 2.0"
        yield Fault(where=f"{field}.max_staleness", message=message)


def reported_of_engine(sampling: RolloutSamplingConfig) -> tuple[str, ...]:
    """Metrics of the last update that an engine adds."""
    if sampling.engine is Engine.own:
        return ()
    return tuple(name for name in OF_ENGINE if name not in OF_CAP or sampling.importance_cap is not None)


def engine_notes(config: PpoConfig, planned: Planned) -> Iterator[str]:
    """What an engine costs, and what it changes."""
    if config.sampling.engine is Engine.own or not planned.has_to_run:
        return
    size = "" if planned.weights is None else f", {planned.weights / 1e9:.2g} GB"
    if config.adapter.kind is AdapterKind.full:
        yield (
            f"vLLM has its own copy of the weights, and after each of {config.updates} updates all of them{size} "
            f"are written to a file for it; with adapter=lora, only the adapter is"
        )
    else:
        yield f"vLLM has its own copy of the frozen weights{size}"
    if config.sampling.max_staleness:
        yield "answers are sampled by the previous policy while the current update is computed"


def engine_doubts(metrics: Mapping[str, float]) -> list[str]:
    """Warnings about a policy that learned from an engine's answers."""
    if metrics.get(GAP, 0.0) <= WORRYING or CAPPED in metrics:
        return []
    return [
        f"the engine that sampled gave log-probabilities that differ from the policy's by {metrics[GAP]:.3f} nats "
        f"per token ({metrics.get(BEYOND, 0.0):.0%} beyond the bound), and nothing corrected for that: the policy "
        f"learned from another policy's answers; set sampling.importance_cap, or sampling.engine=own"
    ]


def engine_curves() -> list[Curve]:
    """Charts of an engine; they are empty without one."""
    return [
        curve(
            "Gap to the engine",
            "nats per token: difference of log-probabilities, mean and largest",
            (GAP, LARGEST_GAP),
            labels=("mean", "largest"),
        ),
        curve(
            "Importance weights", "mean weight, and share of tokens at the cap", OF_CAP, labels=("mean", "at the cap")
        ),
    ]


GUARD = "guard.scorer"
"""The field of the guard's held-out scorer."""


def in_use(config: PpoConfig) -> dict[str, ScoreSourceConfig]:
    """Every scorer that a stage calls, members of ensembles too; the held-out scorer only if the guard is on."""
    held_out = {GUARD: config.guard.scorer} if config.guard.every > 0 else {}
    return with_members(in_list(config.scorers) | held_out)
