"""Settings of a stage that samples answers and makes rows of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig
from alignment.config.launch import SamplingConfig
from alignment.config.rules import FILLED, NOT_NEGATIVE, POSITIVE, SCORE
from alignment.config.scoring import ScorerConfig
from alignment.config.stage import not_identity, reference_to
from alignment.core.fingerprint import IF_SET


class Select(str, Enum):
    """The rows that are made from the answers to a prompt.

    ``best``: a conversation with the answer of the highest score (best of n, rejection sampling; RAFT, Dong et al.
    2023). ``best_worst``: a pair of the best and the worst answer. ``all_pairs``: every pair of answers. ``labels``:
    each answer with a label, good or bad.
    """

    best = "best"
    best_worst = "best_worst"
    all_pairs = "all_pairs"
    labels = "labels"

    @property
    def makes_pairs(self) -> bool:
        """Whether the rows are pairs."""
        return self in (Select.best_worst, Select.all_pairs)


@dataclass(kw_only=True, slots=True)
class SampleConfig:
    """Samples ``completions_per_prompt`` answers of a ``policy`` to each prompt, scores them, and makes rows of them.

    An answer's score is the weighted sum of ``scorers``; a scorer with ``normalize`` is normalised over all answers of
    the stage. ``select`` says which rows are made. Two answers form a pair if their scores differ, by at least
    ``min_margin``. ``threshold`` is the score from which an answer counts as good: ``best`` leaves out a prompt whose
    best answer is below it, and for ``labels`` null means the mean of the prompt's scores.

    Answers that repeat another one to the same prompt or are empty are left out. With ``ended_only`` so are answers
    that reach ``max_new_tokens``, because a stage would learn to stop where they were cut. Each prompt is asked once,
    unless it overlaps with the prompts of ``leave_out``; an empty list stands for the data of the run's evaluations.
    ``sampling`` says how answers are sampled.
    """

    kind: str = "sample"
    policy: str = reference_to("stage:sft", "policy")
    reward: str | None = reference_to("stage:reward", "reward", external=True)
    scorers: Annotated[list[ScorerConfig], FILLED] = field(default_factory=lambda: [ScorerConfig()])
    data: DataConfig = field(default_factory=DataConfig)
    leave_out: list[DataConfig] = field(default_factory=list)
    completions_per_prompt: Annotated[int, POSITIVE] = 4
    temperature: Annotated[float, POSITIVE] = 1.0
    max_prompt_length: Annotated[int, POSITIVE] = 512
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    max_new_tokens: Annotated[int, POSITIVE] = 96
    ended_only: bool = True
    select: Select = Select.best_worst
    min_margin: Annotated[float, NOT_NEGATIVE] = 0.0
    threshold: Annotated[float | None, SCORE] = None
    batch_size: Annotated[int, POSITIVE] = not_identity(128)
    sampling: SamplingConfig = field(default_factory=SamplingConfig, metadata=IF_SET)
