"""Settings of a proximal policy optimisation stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig, PtxConfig, TooLongConfig
from alignment.config.launch import RolloutSamplingConfig
from alignment.config.model import AdapterConfig, Critic
from alignment.config.optim import DEFAULT_TOKENS, MicroBatchTokens, Moments, Schedule
from alignment.config.rules import FILLED, FRACTION, NOT_NEGATIVE, PENALTY, POSITIVE
from alignment.config.scoring import GuardConfig, ScorerConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.fingerprint import IF_SET


class KlControl(str, Enum):
    """``fixed`` keeps the coefficient; ``adaptive`` steers towards a target (Ziegler et al. 2019, section 2.2)."""

    fixed = "fixed"
    adaptive = "adaptive"


class KlTerm(str, Enum):
    """Where the KL penalty applies: in the ``reward``, or in the ``loss`` with a gradient (Shao et al. 2024)."""

    reward = "reward"
    loss = "loss"


class Advantage(str, Enum):
    """What an answer or its tokens are compared with.

    ``gae`` compares with a value model (Schulman et al. 2016). The others compare whole answers to one prompt: with the
    mean of the other answers (``rloo``, Ahmadian et al. 2024), with the mean of all answers, in units of their standard
    deviation (``grpo``, Shao et al. 2024), or with that mean, unscaled (``dr_grpo``, Liu et al. 2025)."""

    gae = "gae"
    rloo = "rloo"
    grpo = "grpo"
    dr_grpo = "dr_grpo"


@dataclass(kw_only=True, slots=True)
class KlConfig:
    """``target`` (nats per sequence) and ``horizon`` (episodes) apply to adaptive control only."""

    control: KlControl = KlControl.fixed
    coefficient: Annotated[float, NOT_NEGATIVE] = 0.05
    target: Annotated[float, POSITIVE] = 6.0
    horizon: Annotated[int, POSITIVE] = 10_000
    apply_to: KlTerm = field(default=KlTerm.reward, metadata=IF_SET)


@dataclass(kw_only=True, slots=True)
class PpoOptimConfig:
    """Adam without weight decay or warm-up; by default the learning rate falls linearly to zero.

    ``batch_size`` is the number of episodes per update, over all processes. ``micro_batch_tokens`` limits the tokens of
    a micro-batch during training; for sampling, a process handles its whole share at once. With ``auto`` the stage
    chooses a number that fits into memory. ``activation_checkpointing`` stores only a layer's input during training,
    and computes the layer again in the backward pass; it does not change what is learned."""

    lr: Annotated[float, POSITIVE] = 3e-5
    critic_lr: Annotated[float | None, POSITIVE] = None
    batch_size: Annotated[int, POSITIVE] = 32
    micro_batch_tokens: MicroBatchTokens = field(default=DEFAULT_TOKENS, metadata={"identity": False})
    activation_checkpointing: bool = field(default=False, metadata={"identity": False})
    schedule: Schedule = Schedule.linear
    adam_eps: Annotated[float, POSITIVE] = 1e-5
    moments: Moments = Moments.full
    max_grad_norm: Annotated[float, POSITIVE] = 1.0


@dataclass(kw_only=True, slots=True)
class OverlongConfig:
    """A penalty for answers that come close to ``max_new_tokens`` (DAPO, Yu et al. 2025, eq. 13).

    It rises linearly from 0 to ``weight`` over the last ``buffer`` tokens; 0 turns it off."""

    buffer: Annotated[int, NOT_NEGATIVE] = 0
    weight: Annotated[float, PENALTY] = 1.0


@dataclass(kw_only=True, slots=True)
class PpoConfig:
    """Proximal policy optimisation against a reward (Schulman et al. 2017; Huang et al. 2024 for the details).

    One update samples ``optim.batch_size`` episodes (``completions_per_prompt`` to a prompt) and takes ``ppo_epochs *
    num_minibatches`` optimiser steps on them; a run has ``updates`` of these. The policy starts from ``init``, which is
    also the reference. An answer's score is the weighted sum of ``scorers``. The value model starts from ``reward`` if
    a stage made that model, else from the policy. It keeps the reward model's head if that model is the only scorer and
    nothing rescales its scores (weight 1, not normalised, not clipped, no ``prompt_baseline``, no ``whiten_rewards``),
    because then scores are on the scale of the returns. Otherwise its head starts at zero, as does the head of a shared
    critic, where one pass computes policy and values. Only the critic learns in the first ``critic_warmup`` updates.
    ``value_clip`` limits how far values move in an update; null sets no limit.

    ``missing_eos_penalty`` is subtracted from the total score of an answer that has no end; it can only lower the
    score. Like ``kl.coefficient``, it is in units of the score. In units of the scores' standard deviation, the
    objective would change with every batch, and with equal scores there would be no penalty. ``length_penalty`` is
    subtracted for each token of an answer, and ``overlong`` for the last ones before ``max_new_tokens``.

    With ``prompt_baseline`` the mean score of the other completions of the prompt is subtracted, because Bradley-Terry
    rewards cannot be compared across prompts. An update ends after a minibatch whose ``policy/approxkl`` exceeds
    ``max_approxkl``.

    Every ``advantage`` except ``gae`` works without a value model: ``critic`` is then ``none``, and
    ``completions_per_prompt`` is the size of a group. ``clip_high`` limits how far a ratio may rise above 1; null means
    the same as ``clip``. The mean entropy of all answer tokens, times ``entropy_coefficient``, is added to the
    objective. With ``drop_ties`` an update learns only from prompts whose answers do not all have the same score.
    ``sampling`` says how answers are sampled."""

    kind: str = "ppo"
    init: str = reference_to("stage:sft", "policy")
    reward: str | None = reference_to("stage:reward", "reward", external=True)
    scorers: Annotated[list[ScorerConfig], FILLED] = field(default_factory=lambda: [ScorerConfig()])
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: PpoOptimConfig = field(default_factory=PpoOptimConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sampling: RolloutSamplingConfig = field(default_factory=RolloutSamplingConfig, metadata=IF_SET)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    updates: Annotated[int, POSITIVE] = 16
    advantage: Advantage = field(default=Advantage.gae, metadata=IF_SET)
    critic: Critic = Critic.separate
    critic_warmup: Annotated[int, NOT_NEGATIVE] = 0
    completions_per_prompt: Annotated[int, POSITIVE] = 1
    prompt_baseline: bool = False
    ppo_epochs: Annotated[int, POSITIVE] = 4
    num_minibatches: Annotated[int, POSITIVE] = 1
    max_approxkl: Annotated[float | None, POSITIVE] = None
    max_prompt_length: Annotated[int, POSITIVE] = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 64
    temperature: Annotated[float, POSITIVE] = 1.0
    gamma: Annotated[float, FRACTION] = 1.0
    gae_lambda: Annotated[float, FRACTION] = 0.95
    clip: Annotated[float, POSITIVE] = 0.2
    clip_high: Annotated[float | None, POSITIVE] = field(default=None, metadata=IF_SET)
    entropy_coefficient: Annotated[float, NOT_NEGATIVE] = field(default=0.0, metadata=IF_SET)
    drop_ties: bool = field(default=False, metadata=IF_SET)
    value_clip: Annotated[float | None, POSITIVE] = 0.2
    value_coefficient: Annotated[float, NOT_NEGATIVE] = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: Annotated[float, PENALTY] = 1.0
    length_penalty: Annotated[float, PENALTY] = field(default=0.0, metadata=IF_SET)
    overlong: OverlongConfig = field(default_factory=OverlongConfig, metadata=IF_SET)
    save_every: Annotated[int, POSITIVE] = not_identity(1)
