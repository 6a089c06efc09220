"""A chat, turn by turn, and what answers in it: the loaded policy itself, or a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from alignment.commands.shared.loaded_policies import parts_of
from alignment.commands.shared.stored_policy import StoredPolicy
from alignment.config.launch import SamplingConfig
from alignment.config.model import Dtype
from alignment.core.errors import DataError
from alignment.core.model_files import positions_in
from alignment.data.tokens.tokenize import end_ids, prompt_ids
from alignment.data.turns import Message
from alignment.engines.completions import Asked, Generation
from alignment.engines.engine_environment import interpreter
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.server_process import RANKS, VllmOptions
from alignment.models.assembly.engine_weights import served_weights, write_merged
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.training.context import own_device

MOST_TOKENS = 4096
"""Of a conversation behind vLLM, which must have room for the keys and values of all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnAnswerer:
    """Generates with a loaded model."""

    model: PreTrainedModel

    @property
    def positions(self) -> int:
        """The number of tokens that it can read and write."""
        return positions_of(unwrapped(self.model).base_model)

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Calls ``on_token`` with each token as it is generated; ``seed`` determines the draws above temperature 0."""
        sampling = None
        if generation.temperature != 0:
            rng = torch.Generator().manual_seed(seed)
            uniforms = torch.rand(1, generation.max_new_tokens, dtype=torch.float64, generator=rng)
            sampling = Sampling(temperature=generation.temperature, uniforms=uniforms)
        generate(
            self.model,
            [prompt],
            max_new_tokens=generation.max_new_tokens,
            end_ids=generation.end_ids,
            batch_size=1,
            sampling=sampling,
            on_token=lambda _, token: on_token(token),
        )

    def close(self) -> None:
        """It started nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAnswerer:
    """Asks the engine of ``session``."""

    session: EngineSession
    weights: Weights
    positions: int

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Asks for a stream of tokens."""
        self.session.stream(self.weights, Asked(prompt=prompt, answers=1, seed=seed), generation, on_token)

    def close(self) -> None:
        """Ends what it started."""
        self.session.close()


def _served_answerer(policy: Lineage, dtype: Dtype, config: SamplingConfig) -> ServedAnswerer:
    """Starts a server for the policy, which ends with this process."""
    interpreter(config.python, package="vllm", where="--engine-python")
    session = EngineSession(config, where="--engine")
    needed = served_weights(policy, highest_rank=RANKS[-1])
    positions = min(MOST_TOKENS, positions_in(needed.below.base) or _positions_by_default(needed.below.base))
    model, on_gpu = write_merged(needed.below, DTYPES[dtype], session.folder / "base"), own_device().type == "cuda"
    session.start(VllmOptions(model=model, dtype=dtype.value, max_length=positions, rank=needed.rank, on_gpu=on_gpu))
    weights = Weights() if needed.adapter is None else Weights(name="policy", folder=needed.adapter)
    session.use(weights)
    return ServedAnswerer(session=session, weights=weights, positions=positions)


def _positions_by_default(model: Path) -> int:
    """Those of a configuration that leaves them to its class."""
    config = AutoConfig.from_pretrained(str(model)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or MOST_TOKENS


HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Options for answers. A ``temperature`` of 0 takes the most likely token; otherwise ``seed`` and the number of the
    answer determine the random draws.

    ``max_new_tokens`` limits an answer.
    """

    system: str = ""
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


@dataclass(kw_only=True)
class ChatSession:
    """A policy called ``name``, what answers for it, and its conversation so far."""

    name: str
    answerer: OwnAnswerer | ServedAnswerer
    tokenizer: Any
    options: GenerationOptions
    history: list[Message] = field(default_factory=list)
    answers: int = 0

    def __post_init__(self) -> None:
        """Renders a first prompt, so that an unusable template is refused at once. Raises DataError: there is no chat
        template, or it refuses the given system message."""
        self.ends = end_ids(self.tokenizer)
        self._rendered([Message(role="user", content="Hi.")])

    def forget(self) -> None:
        """Starts a new conversation."""
        self.history.clear()

    def answer(self, words: str, *, on_text: Callable[[str], None], note: Callable[[str], None]) -> None:
        """Answers the user's ``words``: ``on_text`` receives the text as it is generated; a KeyboardInterrupt ends it.
        ``note`` receives a message if turns were dropped because the conversation became too long for the model. Raises
        DataError: the template refuses these words, or they alone are too long; the history does not change then."""
        asked = Message(role="user", content=words)
        prompt = self._fitting(asked, note)
        room = self.answerer.positions - len(prompt)
        text = _Text(self.tokenizer, on_text)
        generation = Generation(
            max_new_tokens=min(self.options.max_new_tokens, room),
            temperature=self.options.temperature,
            end_ids=sorted(self.ends),
        )
        try:
            self.answerer.answer(prompt, generation, (self.options.seed << 20) + self.answers, text.add)
            text.finish()
        finally:
            self.answers += 1
            if text.text:
                self.history += [asked, Message(role="assistant", content=text.text)]

    def _fitting(self, asked: Message, note: Callable[[str], None]) -> list[int]:
        """The prompt's tokens; the oldest exchanges are dropped until there is room for an answer, or at least half of
        the model's positions."""
        dropped, left = 0, list(self.history)
        positions = self.answerer.positions
        room = min(self.options.max_new_tokens, positions // 2)
        prompt = self._rendered([*left, asked])
        while left and len(prompt) + room > positions:
            left, dropped = left[2:], dropped + 1
            prompt = self._rendered([*left, asked])
        if len(prompt) >= positions:
            message = f"that makes {len(prompt)} tokens, but {self.name} has room for {positions}, including its answer"
            raise DataError(message, remedy="write less")
        if dropped:
            self.history = left
            turns = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            note(f"{self.name}: the oldest {turns} dropped, because the model reads at most {positions} tokens")
        return prompt

    def _rendered(self, turns: list[Message]) -> list[int]:
        system = [Message(role="system", content=self.options.system)] if self.options.system else []
        return prompt_ids(self.tokenizer, [*system, *turns])


class _Text:
    """Decodes tokens and passes the text on, only whole characters."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip().rstrip(HALF_A_CHARACTER))

    def finish(self) -> None:
        """Ends the text: a trailing replacement character is now the model's own."""
        self._emit(self._tokenizer.decode(self._ids, skip_special_tokens=True).lstrip())

    def _emit(self, whole: str) -> None:
        new = whole[len(self.text) :]
        self.text = whole if len(whole) > len(self.text) else self.text
        if new:
            self._on_text(new)


def load_session(
    policy: StoredPolicy, *, options: GenerationOptions, engine: SamplingConfig | None = None
) -> ChatSession:
    """A session with a policy; with ``engine`` a vLLM server answers.

    Raises:
        ArtifactError, ModelError, DataError: as ``parts_of`` and ``ChatSession``, or a model cannot be loaded.
        ConfigError, StageError: there is no environment with vLLM, or the server cannot be started."""
    lineage, tokenizer = parts_of(*policy.sources)
    dtype = Dtype(policy.dtype)
    if engine is None:
        model = load_policy(lineage, DTYPES[dtype]).to(own_device())
        use_flat_attention(model)
        answerer: OwnAnswerer | ServedAnswerer = OwnAnswerer(model=model)
    else:
        answerer = _served_answerer(lineage, dtype, engine)
    return ChatSession(name=policy.name, answerer=answerer, tokenizer=tokenizer, options=options)
