"""A setting that nothing reads is refused, and where it must be let pass it does not change a result's name."""

from __future__ import annotations

import dataclasses

import pytest

from alignment.config.adapter import READ_BY, AdapterConfig
from alignment.core.errors import ConfigError
from tests.unit.pipeline.conftest import MakePlan

DPO, PPO = "stages.dpo", "stages.ppo"
WITHOUT = tuple(
    f"{PPO}.{name}={value}"
    for name, value in {
        "advantage": "grpo",
        "critic": "none",
        "prompt_baseline": "false",
        "gae_lambda": "0.95",
        "value_clip": "0.2",
        "optim.critic_lr": "null",
    }.items()
)
"""The quickstart's PPO without a critic, and without the settings that only a critic has."""
ONLY_LOW_RANK = "has no effect; only adapter.kind 'lora', 'dora', 'qlora', not"


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
def test_dropout_is_refused_where_passes_of_one_model_are_compared(plan: MakePlan, stage: str) -> None:
    where = f"stages.{stage}.adapter.dropout"
    with pytest.raises(ConfigError) as caught:
        plan(f"{where}=0.05")
    assert str(caught.value).startswith(f"{where}: 0.05 is not supported: {stage} compares forward passes of one model")
    plan("stages.sft.adapter.dropout=0.05", f"{where}=0")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((f"{DPO}.adapter={{kind: full, rank: 8}}",), f"{DPO}.adapter.rank: 8 {ONLY_LOW_RANK} 'full'"),
        ((f"{DPO}.adapter={{kind: full, chain: stack}}",), f"{DPO}.adapter.chain: stack has no effect"),
        (("stages.sft.adapter={kind: full, dropout: 0.1}",), f"stages.sft.adapter.dropout: 0.1 {ONLY_LOW_RANK}"),
        (("stages.sft.adapter={kind: lora, virtual_tokens: 8}",), "stages.sft.adapter.virtual_tokens: 8 has no effect"),
        (("stages.reward.adapter={kind: prefix, alpha: 8}",), f"stages.reward.adapter.alpha: 8 {ONLY_LOW_RANK}"),
        (
            (f"{PPO}.kl.control=adaptive", f"{PPO}.kl.horizon=4", f"{PPO}.optim.batch_size=20"),
            f"{PPO}.kl.horizon: 4 episodes, of which one update has 20, so that an update with little KL would make "
            "the coefficient zero or negative; choose more than 4",
        ),
        ((f"{PPO}.kl.control=adaptive", f"{PPO}.kl.coefficient=0"), f"{PPO}.kl.coefficient: 0, which kl.control"),
        ((f"{PPO}.kl.target=3",), f"{PPO}.kl.target: 3 has no effect; only kl.control 'adaptive' uses it"),
        ((f"{PPO}.kl.horizon=50",), f"{PPO}.kl.horizon: 50 has no effect"),
        (
            (f"{PPO}.max_approxkl=0.1", f"{PPO}.ppo_epochs=1", f"{PPO}.num_minibatches=2"),
            f"{PPO}.max_approxkl: 0.1 has no effect: the first minibatch never exceeds it",
        ),
        (
            (f"{PPO}.critic_warmup=4", f"{PPO}.updates=4"),
            f"{PPO}.critic_warmup: only the critic learns in the first 4 of 4 updates, so the policy never learns",
        ),
        (
            (f"{PPO}.critic=none",),
            f"{PPO}.critic: 'none', but advantage 'gae' needs a value model; choose 'separate' or",
        ),
        ((f"{PPO}.drop_ties=true",), f"{PPO}.drop_ties: True has no effect; only an advantage that compares answers"),
        *(
            ((*WITHOUT, f"{PPO}.{name}={value}"), f"{PPO}.{name}: {shown} has no effect; only advantage 'gae' uses it")
            for name, value, shown in (
                ("critic_warmup", "1", "1"),
                ("prompt_baseline", "true", "True"),
                ("gamma", "0.9", "0.9"),
                ("gae_lambda", "1.0", "1"),
                ("value_clip", "10.0", "10"),
                ("value_coefficient", "0.5", "0.5"),
                ("whiten_rewards", "true", "True"),
                ("optim.critic_lr", "1e-3", "0.001"),
            )
        ),
        *(
            (
                (*WITHOUT, f"{PPO}.advantage={advantage}", f"{PPO}.critic={critic}"),
                f"{PPO}.critic: '{critic}', but advantage '{advantage}' has no value model; choose 'none'",
            )
            for advantage in ("rloo", "grpo", "dr_grpo")
            for critic in ("separate", "shared")
        ),
        ((f"{DPO}.too_long.side=right",), f"{DPO}.too_long.side: right has no effect; only too_long.do 'cut'"),
        (("stages.evaluate.judge.max_prompts=9",), "stages.evaluate.judge.max_prompts: 9 has no effect; only a"),
    ],
)
def test_what_the_other_settings_leave_without_a_reader_is_refused(
    plan: MakePlan, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert words in str(caught.value)


def test_the_same_settings_are_taken_where_they_are_read(plan: MakePlan) -> None:
    plan(f"{PPO}.kl={{control: adaptive, target: 3, horizon: 50}}", f"{DPO}.too_long={{do: cut, side: right}}")
    plan(f"{PPO}.kl={{control: adaptive, horizon: 5}}", f"{PPO}.optim.batch_size=24")
    plan(f"{PPO}.max_approxkl=0.1", f"{PPO}.ppo_epochs=1", f"{PPO}.num_minibatches=3")
    plan(f"{PPO}.critic_warmup=3", f"{PPO}.updates=4")
    plan(*WITHOUT, f"{PPO}.drop_ties=true", f"{PPO}.clip_high=0.3", f"{PPO}.entropy_coefficient=0.01")
    plan(f"{PPO}.kl.apply_to=loss", f"{PPO}.clip_high=0.3", f"{PPO}.entropy_coefficient=0.01")
    plan("stages.sft.adapter={kind: qlora, rank: 8, alpha: 8, dropout: 0.1}", f"{DPO}.adapter={{kind: full}}")


def test_every_setting_of_an_adapter_is_read_by_all_kinds_or_by_those_named() -> None:
    names = {field.name for field in dataclasses.fields(AdapterConfig)}
    assert names - set(READ_BY) == {"kind", "master_weights"}


def test_a_loss_that_is_switched_off_has_no_settings_in_a_fingerprint(plan: MakePlan) -> None:
    def named(*overrides: str) -> str:
        source = f"{PPO}.ptx.data.source='bundled:quickstart/conversations'"
        return next(stage.fingerprint for stage in plan(source, *overrides).stages if stage.name == "ppo")

    assert named(f"{PPO}.ptx.batch_size=2") == named()
    assert named(f"{PPO}.ptx.coefficient=1", f"{PPO}.ptx.batch_size=2") != named(f"{PPO}.ptx.coefficient=1")
