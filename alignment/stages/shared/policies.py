"""Policies that answer: arms from artifacts, and those that an engine serves beside the stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from alignment.config.launch import Engine, SamplingConfig
from alignment.core.artifacts import read_manifest
from alignment.core.errors import ConfigError, ModelError, StageError
from alignment.core.model_files import is_adapter, positions_in, reason_of_positions
from alignment.data.tokens.tokenizer import load_tokenizer, stops_alike, tokenizer_hashes
from alignment.engines.completions import OTHER_WEIGHTS, SEEDS, Asked, EngineAnswer, Generation, asked_once
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import RANKS, VllmOptions
from alignment.evaluation.arms import logprobs_after_each, sequence_logprobs
from alignment.job import StageInput
from alignment.models.assembly.engine_weights import ServedWeights, served_weights, write_merged
from alignment.models.assembly.load import DTYPES, Lineage, load_policy, refuse_other_tokenizer
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling
from alignment.training.context import StageContext
from alignment.training.sharding import shared


def session_of(config: SamplingConfig, context: StageContext) -> EngineSession:
    """A session that logs into the work folder of the stage, keeps it from counting as stuck, and adds the engine's
    memory to what the stage records."""

    def waiting() -> None:
        context.heartbeat.reports += 1

    return EngineSession(
        config,
        where=f"stages.{context.spec.stage}.sampling",
        log=context.spec.work / "engine.log",
        waiting=waiting,
        on_peak=context.peaks.of_engine,
    )


def start_engine(session: EngineSession, context: StageContext, options: Callable[[], VllmOptions]) -> None:
    """Starts the engine on the main process, and tells the others where it is; every process must call this.
    ``options`` may write weights for it."""
    context.progress("starting vLLM")

    def address() -> tuple[str, str]:
        if not context.is_main:
            return "", ""
        session.start(options())
        return session.address

    of_main = shared(address)[0]
    if not context.is_main:
        session.join(of_main)


_CHECKED = 32
"""Answers whose log-probabilities are computed once more, at the temperature: enough to notice other weights."""
_LENGTHS = 1024
"""The length that a server is prepared for is a multiple of this, so that a longer turn rarely needs another server."""


class ServedPolicies:
    """Answers of policies by the engine of ``config``, for all processes of a stage. The main process starts the
    server. Policies that differ by one LoRA adapter share it."""

    def __init__(self, config: SamplingConfig, context: StageContext) -> None:
        self._config = config
        self._context = context
        self._session = session_of(config, context)
        self._below: Lineage | None = None
        self._longest = self._rank = 0
        self._weights = Weights()

    def prepare(self, policy: Lineage, longest: int) -> None:
        """Starts a server for the policy unless the running one fits; ``longest`` is a prompt with its answer. Every
        process must call this."""
        needed = served_weights(policy, highest_rank=RANKS[-1])
        if self._config.url is not None:
            self._refuse_other_weights(needed)
            if self._below is None:
                self._start(needed, longest)
        elif needed.below != self._below or longest > self._longest or needed.rank > self._rank:
            self._start(needed, longest)
        if needed.adapter != self._weights.folder:
            self._weights = shared(lambda: self._used(needed.adapter))[0]

    def _refuse_other_weights(self, needed: ServedWeights) -> None:
        """A server at a url has one set of weights, those of a plain folder; only an adapter can be put on them."""
        if needed.below.adapters or self._below not in (None, needed.below):
            names = " and ".join(adapter.path.name for adapter in needed.below.adapters) or needed.below.source
            raise ConfigError(
                f"the server at url has one set of weights, but this policy has different weights ({names} merged)",
                where=f"stages.{self._context.spec.stage}.sampling.url",
                remedy="leave url out; the stage then starts a server with the weights of each policy",
            )

    def _used(self, adapter: Path | None) -> Weights:
        name = None if adapter is None else self._session.named(f"{adapter.parent.parent.name}/{adapter.name}")
        weights = Weights() if name is None else Weights(name=name, folder=adapter)
        if self._context.is_main:
            self._session.use(weights)
        return weights

    def answers(
        self, asked: Sequence[Asked], generation: Generation, progress: Callable[[int], None] = lambda _: None
    ) -> list[list[EngineAnswer]]:
        """The answers of the prepared policy; ``progress`` receives how many there are so far."""
        done = 0

        def count(number: int) -> None:
            nonlocal done
            done += number
            progress(min(done, sum(request.answers for request in asked)))  # a server that died answers some again

        return self._session.answers(self._weights, asked, generation, count)

    def refuse_other_weights(self, answers: Sequence[EngineAnswer], sums: Sequence[float]) -> None:
        """``sums`` are the policy's own log-probabilities of the answers, in nats. Raises StageError: they differ so
        much from the engine's that it has other weights."""
        tokens = sum(len(answer.ids) for answer in answers)
        gap = sum(abs(sum(answer.logprobs) - own) for answer, own in zip(answers, sums, strict=True)) / tokens
        if gap > OTHER_WEIGHTS:
            raise StageError(
                f"the engine's log-probabilities differ from the policy's by {gap:.2f} nats per token, so it has other "
                "weights",
                where=f"stages.{self._context.spec.stage}.sampling",
                remedy="check that the server has the model on which the policy's adapter was trained",
            )

    def _start(self, needed: ServedWeights, longest: int) -> None:
        self._rank = needed.rank if needed.below != self._below else max(self._rank, needed.rank)
        self._longest = -(-longest // _LENGTHS) * _LENGTHS
        if (positions := positions_in(needed.below.base)) is not None:
            if longest > positions:
                raise ModelError(
                    f"the model has {positions} positions{reason_of_positions(needed.below.base)}; a prompt with its "
                    f"answer may need {longest}",
                    where=str(needed.below.base),
                    remedy="lower max_new_tokens, or leave out longer prompts",
                )
            self._longest = min(self._longest, positions)
        self._below, self._weights = needed.below, Weights()

        start_engine(self._session, self._context, lambda: self._options(needed))

    def _options(self, needed: ServedWeights) -> VllmOptions:
        dtype, model = self._context.spec.model.dtype, needed.below.base
        if self._config.url is None:
            folder = self._session.folder / "base"
            shutil.rmtree(folder, ignore_errors=True)
            model = write_merged(needed.below, DTYPES[dtype], folder)
        return VllmOptions(
            model=model,
            dtype=dtype.value,
            max_length=self._longest,
            rank=self._rank,
            on_gpu=self._context.device.type == "cuda",
        )

    def __enter__(self) -> ServedPolicies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()


def served_policies(config: SamplingConfig, context: StageContext) -> ServedPolicies | None:
    """The policies behind an engine; None if the stage samples with its own."""
    return None if config.engine is Engine.own else ServedPolicies(config, context)


def served_answer_and_score(
    served: ServedPolicies,
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    others: Sequence[Sequence[list[int]]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    with_own: bool,
    progress: Callable[[int], None],
    sampling: Sampling | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Like ``answer_and_score``, but the engine answers, prepared for the policy; ``model`` is the policy, which gives
    the log-probabilities."""
    generation = Generation(
        max_new_tokens=max_new_tokens, temperature=sampling.temperature if sampling else 0.0, end_ids=end_ids
    )
    seeds = [0] * len(prompts) if sampling is None else (sampling.uniforms[:, 0] * SEEDS).long().tolist()
    replies = served.answers(asked_once(prompts, seeds), generation, progress)
    answers = [answer for of_prompt in replies for answer in of_prompt]
    texts = [[answer.ids, *after] for answer, after in zip(answers, others, strict=True)]
    sums = logprobs_after_each(model, prompts, texts)
    own = [of_answer[0] for of_answer in sums]
    if generation.temperature not in (0.0, 1.0):  # the engine's log-probabilities are those at the temperature
        ids = [answer.ids for answer in answers[:_CHECKED]]
        own = sequence_logprobs(model, prompts[:_CHECKED], ids, temperature=generation.temperature)
    served.refuse_other_weights(answers[: len(own)], own)
    return [answer.ids for answer in answers], [of_answer[0 if with_own else 1 :] for of_answer in sums]


class Policies:
    """Loads policies, and holds one at a time; loading the held policy again costs nothing. ``served`` answers for
    them, if an engine does."""

    def __init__(self, context: StageContext, served: ServedPolicies | None = None) -> None:
        self.served = served
        self._context = context
        self._loaded: Lineage | None = None
        self._model: PreTrainedModel | None = None

    def load(self, policy: Lineage) -> PreTrainedModel:
        """The policy with its adapters merged, on this process's device."""
        if self._model is None or policy != self._loaded:
            self._model = None  # free the old weights before loading the new ones
            self._model = load_policy(policy, DTYPES[self._context.spec.model.dtype]).to(self._context.device)
            use_flat_attention(self._model)
            self._loaded = policy
        return self._model

    def release(self) -> None:
        """Frees the weights of the last policy."""
        self._model = self._loaded = None


def tokenizer_of(context: StageContext, stage_input: StageInput, ours: Any) -> Any:
    """The run's tokenizer if the arm shares it and stops at the same tokens, else that of the external model."""
    path = stage_input.path
    if path is None or is_adapter(path) or read_manifest(path) is not None:
        refuse_other_tokenizer(context.spec, stage_input, ours)
        return ours
    own = load_tokenizer(path)
    alike = tokenizer_hashes(own) == tokenizer_hashes(ours) and stops_alike(own, ours)
    return ours if alike else own


def asked_tokenizer(context: StageContext, *, field: str) -> Any:
    """The tokenizer of the policy that the stage's ``field`` names: the run's, or its own if it is from outside."""
    spec, policy = context.spec, context.spec.inputs[field]
    ours = load_tokenizer(spec.base_path, spec.model.template)
    tokenizer = tokenizer_of(context, policy, ours)
    if tokenizer is not ours:
        refuse_without_template(context, policy, tokenizer, field=field)
    return tokenizer


def refuse_without_template(
    context: StageContext, stage_input: StageInput, tokenizer: Any, *, field: str = "arms"
) -> None:
    """Does nothing if conversations can be rendered for the policy that the stage's ``field`` names. Raises ModelError:
    its tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"{stage_input.ref} has a tokenizer without a chat template, so its prompts cannot be rendered",
            where=f"stages.{context.spec.stage}.{field}",
            remedy="put the template with which it was trained into its folder (chat_template.jinja)",
        )
