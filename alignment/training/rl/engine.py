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


class RolloutEngine(Protocol):
    """Samples answers from the policy as it is now."""

    def answers(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> list[list[int]]:
        """Token ids of one answer to each prompt, including its end token if it has one.

        ``uniforms`` is ``[prompts, max_new_tokens]``, float64 in [0, 1): the randomness of every token. It depends only
        on the seed, the update and the row, so answers do not depend on how many processes share a batch.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEngine:
    """Samples with the trained model itself, so that there is no second copy of the weights to keep in sync.

    An answer ends at one of ``end_ids``.
    """

    policy: PreTrainedModel | PeftModel
    temperature: float
    end_ids: frozenset[int]

    def answers(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> list[list[int]]:
        """One answer to each prompt, sampled in one batch."""
        return generate(
            unwrapped(self.policy),
            prompts,
            max_new_tokens=uniforms.shape[1],
            end_ids=sorted(self.end_ids),
            batch_size=len(prompts),
            sampling=Sampling(temperature=self.temperature, uniforms=uniforms),
        )
