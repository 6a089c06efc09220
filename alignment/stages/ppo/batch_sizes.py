"""Checks that a PPO update can be divided among processes, when a run is planned and when the stage starts."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.faults import Fault
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.critic_faults import group_faults


def size_faults(config: PpoConfig, processes: int, where: str) -> Iterator[Fault]:
    """Why the stage at ``where`` cannot sample and learn on this number of processes.

    All answers to a prompt stay on one process, for sampling and for learning.
    """
    episodes, group = config.optim.batch_size, config.completions_per_prompt
    yield from group_faults(config, where)
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
            f"{prompts} prompts per update cannot be divided among {processes} processes; choose a multiple of "
            f"{processes * group}"
        )
        yield Fault(where=f"{where}.optim.batch_size", message=message)
    elif prompts // config.num_minibatches < processes:
        least = processes * config.num_minibatches * group
        message = (
            f"{config.num_minibatches} minibatches of {prompts} prompts leave {prompts // config.num_minibatches} for "
            f"{processes} processes; choose optim.batch_size={least} or more, or fewer minibatches"
        )
        yield Fault(where=f"{where}.num_minibatches", message=message)
