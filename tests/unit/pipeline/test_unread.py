"""A setting that nothing reads is noted, and does not change a result's name."""

from __future__ import annotations

import dataclasses

import pytest

from alignment.config.adapter import READ_BY, AdapterConfig
from alignment.core.errors import ConfigError
from alignment.pipeline.execute.notes import of_plan
from tests.unit.pipeline.conftest import MakePlan

DPO, PPO = "stages.dpo", "stages.ppo"
WITHOUT = (f"{PPO}.advantage=grpo", f"{PPO}.critic=none")
"""The quickstart's PPO without a critic."""
EVALUATE, METRIC = "stages.evaluate", "{name: m, source: length, target: 9}"
SERVER = "source: server, server: {base_url: 'http://localhost:1/v1', model: rm, api: vllm_pooling}"


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
        (
            (f"{PPO}.kl.control=adaptive", f"{PPO}.kl.horizon=4", f"{PPO}.optim.batch_size=20"),
            f"{PPO}.kl.horizon: 4 episodes, of which one update has 20, so that an update with little KL would make "
            "the coefficient zero or negative; choose more than 4",
        ),
        ((f"{PPO}.kl.control=adaptive", f"{PPO}.kl.coefficient=0"), f"{PPO}.kl.coefficient: 0, which kl.control"),
        (
            (f"{PPO}.critic_warmup=4", f"{PPO}.updates=4"),
            f"{PPO}.critic_warmup: only the critic learns in the first 4 of 4 updates, so the policy never learns",
        ),
        (
            (f"{PPO}.critic=none",),
            f"{PPO}.critic: 'none', but advantage 'gae' needs a value model; choose 'separate' or",
        ),
        *(
            (
                (*WITHOUT, f"{PPO}.advantage={advantage}", f"{PPO}.critic={critic}"),
                f"{PPO}.critic: '{critic}', but advantage '{advantage}' has no value model; choose 'none'",
            )
            for advantage in ("rloo", "grpo", "dr_grpo")
            for critic in ("separate", "shared")
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    plan: MakePlan, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("others", "setting"),
    [
        ((f"{DPO}.adapter.kind=full",), f"{DPO}.adapter.rank=8"),
        ((f"{DPO}.adapter.kind=full",), f"{DPO}.adapter.chain=stack"),
        (("stages.sft.adapter.kind=full",), "stages.sft.adapter.dropout=0.1"),
        ((), "stages.sft.adapter.virtual_tokens=8"),
        (("stages.reward.adapter.kind=prefix",), "stages.reward.adapter.alpha=8"),
        ((), f"{DPO}.adapter.master_weights=false"),
        (("model.dtype=float32", f"{DPO}.adapter.kind=full"), f"{DPO}.adapter.master_weights=false"),
        ((), f"{PPO}.kl.target=3"),
        ((), f"{PPO}.kl.horizon=50"),
        ((f"{PPO}.ppo_epochs=1", f"{PPO}.num_minibatches=2"), f"{PPO}.max_approxkl=0.1"),
        ((), f"{PPO}.drop_ties=true"),
        (WITHOUT, f"{PPO}.critic_warmup=1"),
        (WITHOUT, f"{PPO}.prompt_baseline=true"),
        (WITHOUT, f"{PPO}.gamma=0.9"),
        (WITHOUT, f"{PPO}.gae_lambda=1.0"),
        (WITHOUT, f"{PPO}.value_clip=10.0"),
        (WITHOUT, f"{PPO}.value_coefficient=0.5"),
        (WITHOUT, f"{PPO}.whiten_rewards=true"),
        (WITHOUT, f"{PPO}.optim.critic_lr=1e-3"),
        ((), f"{PPO}.sampling.cache_gb=2"),
        ((f"{PPO}.scorers=[{{{SERVER}}}]", f"{PPO}.reward=null"), f"{PPO}.scorers.0.server.batch_size=4"),
        ((), f"{DPO}.too_long.side=right"),
        ((), f"{DPO}.validation.share=0.1"),
        ((), f"{DPO}.validation.data.source=path:own.jsonl"),
        ((f"{DPO}.validation={{share: 0.1, every: 1}}",), f"{DPO}.validation.data.fraction=0.5"),
        ((f"{DPO}.loss=orpo",), f"{DPO}.precompute_reference=true"),
        ((), f"{EVALUATE}.judge.max_prompts=9"),
        ((f"{EVALUATE}.judge.kind=people",), f"{EVALUATE}.judge.max_invalid=0.5"),
        ((f"{EVALUATE}.metrics=[{METRIC}]", f"{EVALUATE}.primary=m"), f"{EVALUATE}.metrics.0.passing_score=0.5"),
        ((), "launch.offload=optimizer"),
        (("launch=fsdp",), "launch.offload=optimizer"),
        (("launch=zero2",), "launch.offload=weights"),
    ],
)
def test_a_setting_without_effect_is_noted_and_changes_nothing(
    plan: MakePlan, others: tuple[str, ...], setting: str
) -> None:
    key, (number, item) = setting.partition("=")[0], (".0.", "[0].")
    planned, without = plan(*others, setting), plan(*others)
    assert key.replace(number, item) in {noted.where for noted in planned.unread_settings}
    assert planned.config == without.config
    assert [stage.fingerprint for stage in planned.stages] == [stage.fingerprint for stage in without.stages]


def test_settings_with_the_same_reader_are_named_in_one_line(plan: MakePlan) -> None:
    (line,) = [note for note in of_plan(plan(*WITHOUT, f"{PPO}.gamma=0.9")) if "gamma" in note]
    assert all(f"{PPO}.{name}" in line for name in ("value_clip", "gae_lambda", "optim.critic_lr"))


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
