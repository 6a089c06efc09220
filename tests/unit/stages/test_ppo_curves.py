"""What the report draws of a PPO stage: nothing of a critic where there is none, and ties only there."""

from __future__ import annotations

import pytest

from alignment.config.critic import Critic
from alignment.stages.registry import curves

OF_CRITIC = {"loss/value", "val/explained_variance"}
OF_GROUPS = {"objective/tied_prompts"}


@pytest.mark.parametrize("critic", list(Critic))
def test_curves_are_those_of_the_critic_or_of_groups(critic: Critic) -> None:
    keys = {key for chart in curves("ppo", {"critic": critic.value}) for key in chart.keys}
    absent, drawn = (OF_CRITIC, OF_GROUPS) if critic is Critic.none else (OF_GROUPS, OF_CRITIC)
    assert drawn <= keys
    assert not absent & keys


def test_penalties_are_drawn_together() -> None:
    (chart,) = [chart for chart in curves("ppo", {}) if chart.title == "Penalties"]
    assert chart.keys == ("penalty/length", "penalty/overlong")


def test_a_stage_of_an_earlier_version_has_a_critic() -> None:
    assert {key for chart in curves("ppo", {}) for key in chart.keys} >= OF_CRITIC
