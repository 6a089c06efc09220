"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.evaluating import AnswersConfig, FewShotConfig, GateConfig, GraderConfig, JudgeConfig
from alignment.config.launch import SamplingConfig
from alignment.config.rules import FILLED, POSITIVE
from alignment.config.scoring import MetricConfig
from alignment.config.stage import reference_to
from alignment.core.fingerprint import IF_SET


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Scores greedy answers of every arm to held-out prompts: metrics, reward model and log-ratio to ``reference``.

    ``arms`` are ``base``, ``base+prompt`` (with ``system_prompt`` as a system message), ``base+few-shot`` (examples
    before the prompt), ``stage:NAME``, and external models (``path:FOLDER``, ``hub:ORG/NAME@REVISION``), which may have
    their own tokenizer and chat template. Without a reward model (``reward: null``) that column stays empty. Arms are
    compared by the metric that ``primary`` names, by default the first; without metrics, no arm is called better than
    another. ``sampling`` says what generates the answers.
    """

    kind: str = "evaluate"
    arms: Annotated[list[str], FILLED] = field(
        default_factory=lambda: ["base", "stage:sft", "stage:dpo", "stage:ppo"],
        metadata={"reference": ("policy",), "identity": False},
    )
    reference: str = reference_to("stage:sft", "policy")
    reward: str | None = reference_to("stage:reward", "reward")
    data: DataConfig = field(default_factory=DataConfig)
    metrics: list[MetricConfig] = field(default_factory=list)
    grader: GraderConfig = field(default_factory=GraderConfig)
    primary: str | None = None
    system_prompt: str | None = None
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    batch_size: Annotated[int, POSITIVE] = field(default=128, metadata={"identity": False})
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    gate: list[GateConfig] = field(default_factory=list, metadata={"identity": False})
    sampling: SamplingConfig = field(default_factory=SamplingConfig, metadata=IF_SET)
