"""Samples answers while a policy learns: a protocol, and the engine that samples with the policy itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.models.forward.answers import unwrapped
from alignment.models.forward.generate import Sampling, generate


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAnswers:
    """Token ids of one answer to each prompt, including its end token if it has one.

    ``logprobs`` are those that the answers were sampled with, ``[tokens]`` float32 for each; None if the policy itself
    sampled. ``version`` is that of the weights that sampled.
    """

    ids: list[list[int]]
    logprobs: list[Tensor] | None
    version: int


class RolloutEngine(Protocol):
    """Samples answers from the policy."""

    def follow(self, version: int) -> None:
        """Samples from the policy as it is now, ``version``, from here on; every process must call this."""

    def answers(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> SampledAnswers:
        """One answer to each prompt; several to one prompt are in adjacent rows.

        ``uniforms`` is ``[prompts, max_new_tokens]``, float64 in [0, 1): the randomness of every token. It depends only
        on the seed, the update and the row.
        """


@dataclass(kw_only=True, slots=True)
class PolicyEngine:
    """Samples with the trained model itself, so that there is no second copy of the weights to keep in sync.

    An answer ends at one of ``end_ids``. Answers do not depend on how many processes share a batch.
    """

    policy: PreTrainedModel | PeftModel
    temperature: float
    end_ids: frozenset[int]
    version: int = 0

    def follow(self, version: int) -> None:
        """Notes the version; the weights are the policy's."""
        self.version = version

    def answers(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> SampledAnswers:
        """One answer to each prompt, sampled in one batch."""
        ids = generate(
            unwrapped(self.policy),
            prompts,
            max_new_tokens=uniforms.shape[1],
            end_ids=sorted(self.end_ids),
            batch_size=len(prompts),
            sampling=Sampling(temperature=self.temperature, uniforms=uniforms),
        )
        return SampledAnswers(ids=ids, logprobs=None, version=self.version)
