"""What each kind of stage can be told. ``STAGES`` is the one table of kinds.

A field whose metadata says ``identity: False`` does not change the result and stays out of the fingerprint. A field
whose metadata says ``reference`` names another stage (``stage:NAME``), the run's base model (``base``) or a folder
(``path:FOLDER``), and which kinds of artifact it takes; what it points to is fingerprinted, not its name.

``max_length`` counts the tokens of a whole row, ``max_prompt_length`` and ``max_answer_length`` those of its parts: of
a conversation all before the last turn, and that turn. ``too_long`` says what becomes of longer rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from alignment.config.adapter import AdapterConfig
from alignment.config.data import DataConfig
from alignment.config.evaluation import FewShotConfig, JudgeConfig
from alignment.config.guard import GuardConfig
from alignment.config.optim import Moments, OptimConfig, Schedule
from alignment.config.scorers import ScorerConfig
from alignment.config.too_long import TooLongConfig


def _reference(default: str, *kinds: str) -> str:
    return field(default=default, metadata={"reference": kinds, "identity": False})


def _not_identity(default: int) -> int:
    return field(default=default, metadata={"identity": False})


@dataclass(kw_only=True, slots=True)
class CptConfig:
    """Continued pretraining: every token of plain texts is learned, each text cut into rows of ``max_length`` tokens.

    ``packing`` puts short rows together; they do not see one another.
    """

    summary: ClassVar[str] = "continued pretraining on plain text"
    revision: ClassVar[int] = 3
    produces: ClassVar[str] = "policy"

    kind: str = "cpt"
    init: str = _reference("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/conversations"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4))
    max_length: int = 1024
    packing: bool = True
    log_every: int = _not_identity(1)
    save_every: int = _not_identity(10)


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning on conversations: only assistant turns are learned, their end included."""

    summary: ClassVar[str] = "instruction tuning on conversations"
    revision: ClassVar[int] = 4
    produces: ClassVar[str] = "policy"

    kind: str = "sft"
    init: str = _reference("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/conversations"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_answer_length: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    packing: bool = False
    log_every: int = _not_identity(1)
    save_every: int = _not_identity(10)


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """A Bradley-Terry reward model: a scalar score at the last token of an answer (Stiennon et al. 2020, eq. 1).

    ``center_coefficient`` weighs (r_chosen + r_rejected)² in the loss (Eisenstein et al. 2023). ``eval_fraction`` of
    the prompts is held out for the accuracy, and for the offset that makes chosen answers score 0 on average.
    """

    summary: ClassVar[str] = "reward model from preference pairs"
    revision: ClassVar[int] = 4
    produces: ClassVar[str] = "reward"

    kind: str = "reward"
    init: str = _reference("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, adam_eps=1e-5))
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_answer_length: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    center_coefficient: float = 0.0
    eval_fraction: float = 0.1
    log_every: int = _not_identity(1)
    save_every: int = _not_identity(10)


class DpoLoss(str, Enum):
    """Preference losses that TRL's DPO trainer offers and that we test, of log-ratios to the reference.

    ``sigmoid``: −log σ(β Δ) of their sums over answers (Rafailov et al. 2023). ``sigmoid_norm``: the same of means
    over an answer's tokens (Lambert et al. 2024), with a larger beta. ``hinge``: max(0, 1 − β Δ) (Zhao et al. 2023).
    ``ipo``: (Δ − 1/(2 β))² of means (Azar et al. 2023).
    """

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al. 2023). The reference is the policy at the start of the stage.

    With ``precompute_reference`` its log-probabilities are computed once and kept beside the artifacts: worth it for
    several epochs, or several stages on the same pairs. Otherwise it runs beside the policy.
    """

    summary: ClassVar[str] = "direct preference optimisation on the same pairs"
    revision: ClassVar[int] = 4
    produces: ClassVar[str] = "policy"

    kind: str = "dpo"
    init: str = _reference("stage:sft", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-5))
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_answer_length: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    beta: float = 0.1
    loss: DpoLoss = DpoLoss.sigmoid
    precompute_reference: bool = field(default=False, metadata={"identity": False})
    log_every: int = _not_identity(1)
    save_every: int = _not_identity(10)


class KlControl(str, Enum):
    """``fixed`` keeps the coefficient; ``adaptive`` steers towards a target (Ziegler et al. 2019, section 2.2)."""

    fixed = "fixed"
    adaptive = "adaptive"


@dataclass(kw_only=True, slots=True)
class KlConfig:
    """``target`` (nats a sequence) and ``horizon`` (episodes) apply to adaptive control only."""

    control: KlControl = KlControl.fixed
    coefficient: float = 0.05
    target: float = 6.0
    horizon: int = 10_000


class Critic(str, Enum):
    """``separate`` is a model of its own that starts from the reward model, ``shared`` a head on the policy's trunk."""

    separate = "separate"
    shared = "shared"


@dataclass(kw_only=True, slots=True)
class PtxConfig:
    """Ordinary language modelling beside PPO, against forgetting (Ouyang et al. 2022, eq. 2).

    ``coefficient`` weighs the token-mean loss on the assistant turns of ``batch_size`` conversations a step; 0 is off.
    """

    coefficient: float = 0.0
    batch_size: int = 8
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/conversations"))


@dataclass(kw_only=True, slots=True)
class PpoConfig:
    """Proximal policy optimisation against a reward (Schulman et al. 2017; Huang et al. 2024 for the details).

    One update samples ``optim.batch_size`` episodes (``completions_per_prompt`` to a prompt) and takes ``ppo_epochs *
    num_minibatches`` optimiser steps on them; ``updates`` of these make the run. The policy starts from ``init``, which
    is also the reference. An answer's score is the sum of ``scorers``. The value model starts from ``reward`` where
    that is a reward model of ours, else from the policy. It says what the reward model says where that alone scores,
    unchanged (weight 1, neither normalised nor clipped, no ``prompt_baseline``, no ``whiten_rewards``): then values are
    on the scale of the returns. Else its head is one of zeros, as a shared one is, where one pass serves both.
    It learns alone for the first ``critic_warmup`` updates. ``value_clip`` bounds how far values move in an update;
    null bounds nothing.

    ``missing_eos_penalty`` is taken off the score of an answer that never ended, after scorers were put together; it
    can only lower it. Its unit is the score's own, as that of ``kl.coefficient`` is: measured in deviations of scores,
    what is maximised would change with every batch, and where all answers score alike there would be no penalty. With
    ``prompt_baseline`` the mean score of the other completions of the same prompt is taken off: a Bradley-Terry reward
    says nothing across prompts. A minibatch whose ``policy/approxkl`` exceeds ``max_approxkl`` is the update's last.
    """

    summary: ClassVar[str] = "proximal policy optimisation against the reward model"
    revision: ClassVar[int] = 5
    produces: ClassVar[str] = "policy"

    kind: str = "ppo"
    init: str = _reference("stage:sft", "policy")
    reward: str | None = _reference("stage:reward", "reward")
    scorers: list[ScorerConfig] = field(default_factory=lambda: [ScorerConfig()])
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    optim: PpoOptimConfig = field(default_factory=lambda: PpoOptimConfig())
    kl: KlConfig = field(default_factory=KlConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    ptx: PtxConfig = field(default_factory=PtxConfig)
    updates: int = 16
    critic: Critic = Critic.separate
    critic_warmup: int = 0
    completions_per_prompt: int = 1
    prompt_baseline: bool = False
    ppo_epochs: int = 4
    num_minibatches: int = 1
    max_approxkl: float | None = None
    max_prompt_length: int = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: int = 64
    temperature: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: float = 1.0
    save_every: int = _not_identity(1)


@dataclass(kw_only=True, slots=True)
class PpoOptimConfig:
    """Adam without weight decay or warm-up, annealed to zero. ``batch_size`` counts episodes an update, globally.

    ``micro_batch_tokens`` are learned from at once; a process samples its whole share at once.
    """

    lr: float = 3e-5
    critic_lr: float | None = None
    batch_size: int = 32
    micro_batch_tokens: int = field(default=2048, metadata={"identity": False})
    schedule: Schedule = Schedule.linear
    adam_eps: float = 1e-5
    moments: Moments = Moments.full
    max_grad_norm: float = 1.0


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Greedy answers of every arm to held-out prompts: metrics, reward model and log-ratio to ``reference``.

    ``arms`` are ``base``, ``base+prompt`` (the house style as a system message), ``base+few-shot`` (examples before the
    prompt), ``stage:NAME``, and models from outside (``path:FOLDER``, ``hub:ORG/NAME@REVISION``), which may have a
    tokenizer and a chat template of their own. Without a reward model (``reward: null``) that column stays empty.
    """

    summary: ClassVar[str] = "arms side by side on held-out prompts"
    revision: ClassVar[int] = 6
    produces: ClassVar[str] = "evaluation"

    kind: str = "evaluate"
    arms: list[str] = field(
        default_factory=lambda: ["base", "base+prompt", "stage:sft", "stage:dpo", "stage:ppo"],
        metadata={"reference": ("policy",), "identity": False},
    )
    reference: str = _reference("stage:sft", "policy")
    reward: str | None = _reference("stage:reward", "reward")
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/heldout"))
    max_new_tokens: int = 96
    batch_size: int = field(default=128, metadata={"identity": False})
    bootstrap_samples: int = 2000
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


class Rule(str, Enum):
    """A rule whose preferences a reward card holds against the model's. ``house_style``: that of the quickstart."""

    house_style = "house_style"


@dataclass(kw_only=True, slots=True)
class RewardCardConfig:
    """A reward model held against pairs, and beside it what is told by length and by words alone.

    ``reward`` may also be one that no stage made. ``learned`` are the pairs that it learned from: a bag of words learns
    from the same, and with ``leave_out_learned`` no pair is judged whose prompt stands there. Without a source these
    are the pairs of the stage that made the model, but for what that stage mixes in; of a model from elsewhere nothing
    is known then, and there is no bag of words. ``invariance_pairs`` are scored again alone, padded, in another order
    and in float32; 0 scores none. ``num_worst`` pairs are kept to read.
    """

    summary: ClassVar[str] = "a reward model's report card on held-out pairs"
    revision: ClassVar[int] = 2
    produces: ClassVar[str] = "reward_card"

    kind: str = "reward_card"
    reward: str = _reference("stage:reward", "reward")
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:quickstart/preferences"))
    learned: DataConfig = field(default_factory=DataConfig)
    leave_out_learned: bool = True
    rule: Rule | None = None
    max_length: int = 2048
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    micro_batch_tokens: int = _not_identity(4096)
    invariance_pairs: int = 16
    bootstrap_samples: int = 2000
    num_worst: int = 10


@dataclass(kw_only=True, slots=True)
class ForgettingConfig:
    """What policies have lost of what the base model could, and a gate: a run in which one lost more ends with code 10.

    The base model and then each of ``arms`` read the plain texts of ``data`` and choose answers to ``questions``. An
    arm passes if its perplexity rose by at most ``max_perplexity_rise`` of the base's (.2: from 20 to 24), and its
    share of right answers fell by at most ``max_ability_drop`` (.1: from .64 to .54). Both limits: chosen, not tuned.
    A limit of null is none; without both, arms are measured and not judged.
    """

    summary: ClassVar[str] = "what policies forgot of general text and questions, with a gate"
    revision: ClassVar[int] = 2
    produces: ClassVar[str] = "forgetting"

    kind: str = "forgetting"
    arms: list[str] = field(default_factory=list, metadata={"reference": ("policy",), "identity": False})
    data: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/texts"))
    questions: DataConfig = field(default_factory=lambda: DataConfig(source="bundled:general/questions"))
    max_perplexity_rise: float | None = 0.2
    max_ability_drop: float | None = 0.1
    bootstrap_samples: int = 2000


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """One self-contained HTML file about the run; made by the driver from files alone."""

    summary: ClassVar[str] = "one HTML page about the whole run"
    revision: ClassVar[int] = 2
    produces: ClassVar[str] = "report"

    kind: str = "report"
    evaluation: str | None = _reference("stage:evaluate", "evaluation")
    num_samples: int = 12


StageConfig = (
    CptConfig
    | SftConfig
    | RewardConfig
    | DpoConfig
    | PpoConfig
    | EvaluateConfig
    | ForgettingConfig
    | RewardCardConfig
    | ReportConfig
)

Trained = CptConfig | SftConfig | RewardConfig | DpoConfig | PpoConfig
"""Stages that train a model."""

Measuring = EvaluateConfig | ForgettingConfig | RewardCardConfig
"""Stages that measure models: one process's work."""

STAGES: dict[str, type[StageConfig]] = {
    "cpt": CptConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "evaluate": EvaluateConfig,
    "forgetting": ForgettingConfig,
    "report": ReportConfig,
    "reward_card": RewardCardConfig,
}
