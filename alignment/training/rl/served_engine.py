"""Samples with a vLLM server, whose weights follow the policy (docs/design/0033)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.engines.completions import SEEDS, Generation, asked_once
from alignment.engines.engine_session import EngineSession, Weights
from alignment.models.assembly.engine_weights import write_adapter, write_model
from alignment.models.assembly.load import DTYPES
from alignment.models.forward.answers import unwrapped
from alignment.training.context import StageContext
from alignment.training.rl.engine import SampledAnswers
from alignment.training.sharding import is_sharded, shared, whole_state


@dataclass(kw_only=True, slots=True)
class ServedEngine:
    """Samples with the engine of ``session``, which is started on the main process and joined on the others.

    After an update the policy's adapter, or all its weights, are written to a folder and loaded under the name of the
    version. Answers are asked for by that name.
    """

    session: EngineSession
    policy: PreTrainedModel | PeftModel
    context: StageContext
    generation: Generation
    version: int = 0
    _weights: Weights = field(default_factory=Weights)

    def follow(self, version: int) -> None:
        """Loads the policy as it is now, unless the engine has this version.

        Raises:
            StageError: the engine does not take the weights.
        """
        if self._weights.folder is not None and version == self.version:
            return
        is_adapter, state = isinstance(self.policy, PeftModel), None
        if not is_adapter or is_sharded(self.policy):
            state = whole_state(self.policy, trained_only=is_adapter)
        before = self._weights
        self._weights, self.version = shared(lambda: self._loaded(version, state))[0], version
        if self.context.is_main and before.folder is not None:
            shutil.rmtree(before.folder)

    def _loaded(self, version: int, state: dict[str, Tensor] | None) -> Weights:
        """The weights as they are now; the main process names and writes them, and has the engine load them."""
        if not self.context.is_main:
            return Weights()
        folder, is_adapter = self.session.folder / f"policy-{version}", isinstance(self.policy, PeftModel)
        weights = Weights(name=self.session.named(folder.name), folder=folder, whole=not is_adapter)
        if isinstance(self.policy, PeftModel):
            write_adapter(self.policy, state, folder)
        else:
            assert state is not None, "whole weights are gathered"
            write_model(unwrapped(self.policy), state, DTYPES[self.context.spec.model.dtype], folder)
        self.session.use(weights)
        return weights

    def answers(self, prompts: Sequence[Sequence[int]], uniforms: Tensor) -> SampledAnswers:
        """One answer to each prompt; equal adjacent prompts are one call.

        Raises:
            StageError: the engine failed, or gave answers of another version.
        """
        asked = asked_once(prompts, (uniforms[:, 0] * SEEDS).long().tolist())
        replies = self.session.answers(self._weights, asked, self.generation)
        answers = [answer for of_prompt in replies for answer in of_prompt]
        return SampledAnswers(
            ids=[answer.ids for answer in answers],
            logprobs=[torch.tensor(answer.logprobs) for answer in answers],
            version=self.version,
        )
