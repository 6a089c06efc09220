"""What samples the answers: this package's generation or a server, and the gap between the two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from alignment.algos.ppo import truncated_importance
from alignment.config.launch import Engine, RolloutSamplingConfig
from alignment.config.model import AdapterKind
from alignment.core.errors import StageError
from alignment.engines.completions import OTHER_WEIGHTS, SEEDS, Generation, asked_once
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import VllmOptions
from alignment.models.assembly.engine_weights import write_adapter, write_base, write_model
from alignment.models.assembly.load import DTYPES, Lineage
from alignment.models.assembly.roles import Roles
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.generate import Sampling, generate
from alignment.stages.ppo.checks import BEYOND, CAPPED, GAP, IMPORTANCE, LARGEST_GAP, STALENESS
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.ppo.experience import Prompts, ScoredBatch
from alignment.stages.ppo.step_metrics import UpdateMetrics
from alignment.stages.shared.policies import session_of, start_engine
from alignment.training.context import StageContext
from alignment.training.sharding import is_sharded, shared, whole_state


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledAnswers:
    """Token ids of one answer to each prompt, including its end token if it has one. ``logprobs`` are those that the
    answers were sampled with, ``[tokens]`` float32 for each; None if the policy itself sampled. ``version`` is that of
    the weights that sampled."""

    ids: list[list[int]]
    logprobs: list[Tensor] | None
    version: int


@dataclass(kw_only=True, slots=True)
class PolicyEngine:
    """Samples with the trained model itself, so that there is no second copy of the weights to keep in sync. An answer
    ends at one of ``end_ids``. Answers do not depend on how many processes share a batch. An engine samples from the
    policy as it was when every process last called ``follow``. It gives one answer to each prompt; several to one
    prompt are in adjacent rows. ``uniforms`` is ``[prompts, max_new_tokens]``, float64 in [0, 1): the randomness of
    every token, which depends only on the seed, the update and the row."""

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


@dataclass(kw_only=True, slots=True)
class ServedEngine:
    """Samples with the engine of ``session``, which is started on the main process and joined on the others. After an
    update the policy's adapter, or all its weights, are written to a folder and loaded under the name of the version.
    Answers are asked for by that name."""

    session: EngineSession
    policy: PreTrainedModel | PeftModel
    context: StageContext
    generation: Generation
    version: int = 0
    _weights: Weights = field(default_factory=Weights)

    def follow(self, version: int) -> None:
        """Loads the policy as it is now, unless the engine has this version."""
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
        """One answer to each prompt; equal adjacent prompts are one call."""
        asked = asked_once(prompts, (uniforms[:, 0] * SEEDS).long().tolist())
        replies = self.session.answers(self._weights, asked, self.generation)
        answers = [answer for of_prompt in replies for answer in of_prompt]
        return SampledAnswers(
            ids=[answer.ids for answer in answers],
            logprobs=[torch.tensor(answer.logprobs) for answer in answers],
            version=self.version,
        )


RolloutEngine = PolicyEngine | ServedEngine


@dataclass(eq=False)
class EngineGap:
    """Compares an engine's log-probabilities with the policy's; ``where`` is the setting of the engine."""

    config: RolloutSamplingConfig
    whole_answers: bool
    where: str

    def importance(self, batch: ScoredBatch, update: int, metrics: UpdateMetrics) -> Tensor | None:
        """``[rows, tokens]`` weights of the policy's loss; None without an engine or without a cap."""
        if batch.sampled_logprobs is None:
            return None
        self._add_gap(batch, batch.sampled_logprobs, update, metrics)
        cap = self.config.importance_cap
        if cap is None:
            return None
        weights = truncated_importance(
            batch.logprobs, batch.sampled_logprobs, batch.response_mask, cap=cap, whole_answers=self.whole_answers
        )
        capped = (weights >= cap * (1 - 1e-6)).float()
        metrics.add_means({IMPORTANCE: weights, CAPPED: capped}, batch.response_mask)
        return weights

    def _add_gap(self, batch: ScoredBatch, sampled: Tensor, update: int, metrics: UpdateMetrics) -> None:
        gap = (batch.logprobs - sampled).abs() * batch.response_mask
        metrics.add_means({GAP: gap, BEYOND: (gap > self.config.gap_bound).float()}, batch.response_mask)
        metrics.values[LARGEST_GAP] = float(gap.max())
        staleness = update - min(batch.rollout.versions)
        metrics.values[STALENESS] = float(staleness)
        if not 0 <= staleness <= self.config.max_staleness:
            raise StageError(
                f"answers of update {update} were sampled by the policy of update {min(batch.rollout.versions)}",
                where=self.where,
                remedy="they were not used for training; please report this with the stage.yaml of the run",
            )
        if staleness == 0 and metrics.values[GAP] > OTHER_WEIGHTS:
            raise StageError(
                f"the engine's log-probabilities differ from the policy's by {metrics.values[GAP]:.2f} nats per token, "
                "so it has other weights",
                where=self.where,
                remedy="its answers were not used for training; check that the server has the model from which the "
                "stage starts",
            )


@contextmanager
def served_engine(
    config: PpoConfig, context: StageContext, roles: Roles, start: Lineage, *prompts: Prompts, end_ids: frozenset[int]
) -> Iterator[ServedEngine | None]:
    """The engine, until the block ends; None if the policy samples. The main process starts it, and the others ask it.
    ``prompts`` are all that will be asked."""
    if config.sampling.engine is Engine.own:
        yield None
        return

    longest = max(len(ids) for asked in prompts for ids in asked.ids) + config.max_new_tokens
    with session_of(config.sampling, context) as session:
        start_engine(session, context, lambda: _options(config, context, start, session, longest))
        generation = Generation(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, end_ids=sorted(end_ids)
        )
        yield ServedEngine(session=session, policy=roles.policy, context=context, generation=generation)


def _options(
    config: PpoConfig, context: StageContext, start: Lineage, session: EngineSession, longest: int
) -> VllmOptions:
    dtype, full = context.spec.model.dtype, config.adapter.kind is AdapterKind.full
    model = start.base
    if config.sampling.url is None:
        model = write_base(start, config.adapter, DTYPES[dtype], session.folder / "base")
    return VllmOptions(
        model=model,
        dtype=dtype.value,
        max_length=longest,
        rank=0 if full else config.adapter.rank,
        replaceable=full,
        on_gpu=context.device.type == "cuda",
    )
