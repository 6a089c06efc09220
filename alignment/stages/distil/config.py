"""Settings of a stage in which a smaller student learns from a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.launch import SamplingConfig
from alignment.config.model import AdapterConfig
from alignment.config.rules import BELOW_ONE, NOT_NEGATIVE, POSITIVE
from alignment.config.stage import OptimConfig, not_identity, reference_to


class Method(str, Enum):
    """What the student learns from the teacher's answers.

    ``tokens``: the teacher's whole distribution at each token, with the forward divergence (Hinton et al. 2015, section
    2). ``sequence``: the answers themselves (sequence-level distillation, Kim and Rush 2016, section 3.2).
    """

    tokens = "tokens"
    sequence = "sequence"

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher is asked while the student trains."""
        return self is Method.tokens


@dataclass(kw_only=True, slots=True)
class DistilConfig:
    """A student learns the answers that a ``teacher`` samples to the prompts of ``data``.

    The student is the policy ``init``. With ``layers`` it is a model made of the first decoder layers of ``init``, with
    its embeddings, last norm and head: a draft for speculative decoding. Its weights are those of ``init`` with all
    adapters merged. Student and teacher share a tokenizer.

    The teacher samples ``completions_per_prompt`` answers at ``temperature``, ``batch_size`` at a time, and
    ``sampling`` says how. The loss of ``tokens`` divides the logits of both by ``loss_temperature``; the reported
    figures divide them by ``temperature``. Each prompt is asked once, unless it overlaps with the prompts of
    ``leave_out``. An empty ``leave_out`` stands for the data of the run's evaluations.

    ``eval_fraction`` of the prompts is held out. On the teacher's answers to these, the student is compared with the
    teacher before and after training: how often would speculative decoding with ``gamma`` drafted tokens per step
    accept a token (Leviathan et al. 2023)? Greedy answers to ``timed_prompts`` of them are generated with and without
    the draft.
    """

    kind: str = "distil"
    init: str = reference_to("base", "policy")
    layers: Annotated[int | None, POSITIVE] = None
    teacher: str = reference_to("stage:sft", "policy")
    method: Method = Method.tokens
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    leave_out: list[DataConfig] = field(default_factory=list)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    loss_temperature: Annotated[float, POSITIVE] = 1.0
    completions_per_prompt: Annotated[int, POSITIVE] = 1
    temperature: Annotated[float, POSITIVE] = 1.0
    max_prompt_length: Annotated[int, POSITIVE] = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    batch_size: Annotated[int, POSITIVE] = not_identity(128)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    eval_fraction: Annotated[float, BELOW_ONE] = 0.1
    gamma: Annotated[int, POSITIVE] = 4
    timed_prompts: Annotated[int, NOT_NEGATIVE] = 0
    bootstrap_samples: Annotated[int, POSITIVE] = 2000
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)
