"""Whether the settings suit the advantage: with a value model, or by comparison of the answers to one prompt.

Nothing here imports torch, because the plan uses it too.
"""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.critic import Critic
from alignment.config.faults import Fault, unread_notes
from alignment.stages.ppo.config import Advantage, PpoConfig, PpoOptimConfig

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
            message = (
                "'none', but advantage 'gae' needs a value model; choose 'separate' or 'shared', or set advantage to "
                "'rloo', 'grpo' or 'dr_grpo'"
            )
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


def group_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    """A group of one answer, with which nothing can be compared."""
    if config.completions_per_prompt > 1:
        return
    if config.advantage is not Advantage.gae:
        message = f"1, but advantage {config.advantage.value!r} compares the answers to a prompt; choose 2 or more"
        yield Fault(where=f"{where}.completions_per_prompt", message=message)
    elif config.prompt_baseline:
        message = (
            "the baseline is the mean over the other completions of a prompt, but there are none; set "
            "completions_per_prompt to 2 or more"
        )
        yield Fault(where=f"{where}.prompt_baseline", message=message)
