"""An update of PPO that cannot be shared out is refused with what would do."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.config.critic import Critic
from alignment.config.overoptimisation import GuardConfig
from alignment.stages.ppo.batch_sizes import size_faults
from alignment.stages.ppo.config import Advantage, PpoConfig, PpoOptimConfig


def faults(processes: int, batch_size: int = 32, **fields: Any) -> list[str]:
    config = PpoConfig(optim=PpoOptimConfig(batch_size=batch_size), **fields)
    return [str(fault) for fault in size_faults(config, processes, "stages.p")]


@pytest.mark.parametrize(
    ("processes", "fields", "message"),
    [
        (
            1,
            {"batch_size": 8, "completions_per_prompt": 3},
            "stages.p.completions_per_prompt: 8 episodes cannot be divided into groups of 3 completions; choose a "
            "divisor of optim.batch_size",
        ),
        (
            1,
            {"prompt_baseline": True},
            "stages.p.prompt_baseline: the baseline is the mean over the other completions of a prompt, but there are "
            "none; set completions_per_prompt to 2 or more",
        ),
        *(
            (
                1,
                {"advantage": advantage, "critic": Critic.none},
                f"stages.p.completions_per_prompt: 1, but advantage '{advantage.value}' compares the answers to a "
                "prompt; choose 2 or more",
            )
            for advantage in (Advantage.rloo, Advantage.grpo, Advantage.dr_grpo)
        ),
        (
            3,
            {"completions_per_prompt": 4},
            "stages.p.optim.batch_size: 8 prompts per update cannot be divided among 3 processes; choose a multiple "
            "of 12",
        ),
        (
            2,
            {"batch_size": 4, "completions_per_prompt": 2, "num_minibatches": 2},
            "stages.p.num_minibatches: 2 minibatches of 2 prompts leave 1 for 2 processes; "
            "choose optim.batch_size=8 or more, or fewer minibatches",
        ),
        (
            4,
            {"guard": GuardConfig(every=1, prompts=3)},
            "stages.p.guard.prompts: 3 prompts are too few for 4 processes; choose 4 or more",
        ),
    ],
)
def test_an_update_that_cannot_be_shared_out_is_named_exactly(
    processes: int, fields: dict[str, Any], message: str
) -> None:
    assert faults(processes, **fields) == [message]


def test_what_a_message_says_would_do_does() -> None:
    assert faults(2, batch_size=8, completions_per_prompt=2, num_minibatches=2) == []
    assert faults(3, batch_size=12, completions_per_prompt=4) == []
    assert faults(4, guard=GuardConfig(every=1, prompts=4)) == []
    assert faults(4, guard=GuardConfig(every=0, prompts=1)) == []
