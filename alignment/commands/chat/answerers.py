"""What answers in a chat: the loaded policy itself, or a vLLM server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoConfig, PreTrainedModel

from alignment.config.model import Dtype
from alignment.config.sampling_engine import SamplingConfig
from alignment.core.model_files import positions_in
from alignment.engines.completions import Asked, Generation
from alignment.engines.engine_environment import interpreter
from alignment.engines.engine_session import EngineSession, Weights
from alignment.engines.vllm_server import RANKS, VllmOptions
from alignment.models.assembly.engine_weights import served_weights, write_merged
from alignment.models.assembly.load import DTYPES, Lineage, load_policy
from alignment.models.assembly.prefix import positions_of
from alignment.models.forward.answers import unwrapped
from alignment.models.forward.flat import use_flat_attention
from alignment.models.forward.generate import Sampling, generate
from alignment.training.device import own_device

MOST_TOKENS = 4096
"""Of a conversation behind vLLM, which must have room for the keys and values of all of them."""


class Answerer(Protocol):
    """Answers one prompt at a time."""

    @property
    def positions(self) -> int:
        """The number of tokens that it can read and write."""

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Calls ``on_token`` with each token as it is generated. ``seed`` determines the draws above temperature 0."""

    def close(self) -> None:
        """Ends what it started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnAnswerer:
    """Generates with a loaded model."""

    model: PreTrainedModel

    @property
    def positions(self) -> int:
        """The model's."""
        return positions_of(unwrapped(self.model).base_model)

    def answer(self, prompt: Sequence[int], generation: Generation, seed: int, on_token: Callable[[int], None]) -> None:
        """Generates in a batch of one."""
        generate(
            self.model,
            [prompt],
            max_new_tokens=generation.max_new_tokens,
            end_ids=generation.end_ids,
            batch_size=1,
            sampling=_sampling(generation, seed),
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
        """Ends the server."""
        self.session.close()


def own_answerer(policy: Lineage, dtype: Dtype) -> OwnAnswerer:
    """Loads the policy as an evaluation does.

    Raises:
        ModelError: it cannot be loaded.
    """
    model = load_policy(policy, DTYPES[dtype]).to(own_device())
    use_flat_attention(model)
    return OwnAnswerer(model=model)


def served_answerer(policy: Lineage, dtype: Dtype, config: SamplingConfig) -> ServedAnswerer:
    """Starts a server for the policy, which ends with this process.

    Raises:
        ConfigError: there is no environment with vLLM.
        ModelError: vLLM does not take the policy.
        StageError: the server cannot be started.
    """
    interpreter(config.python, package="vllm", where="--engine-python")
    session = EngineSession(config, where="--engine")
    needed = served_weights(policy, highest_rank=RANKS[-1])
    positions = min(MOST_TOKENS, positions_in(needed.below.base) or _positions_by_default(needed.below.base))
    model = write_merged(needed.below, DTYPES[dtype], session.folder / "base")
    session.start(
        VllmOptions(
            model=model,
            dtype=dtype.value,
            max_length=positions,
            rank=needed.rank,
            on_gpu=own_device().type == "cuda",
        )
    )
    weights = Weights() if needed.adapter is None else Weights(name="policy", folder=needed.adapter)
    session.use(weights)
    return ServedAnswerer(session=session, weights=weights, positions=positions)


def _positions_by_default(model: Path) -> int:
    """Those of a configuration that leaves them to its class."""
    config = AutoConfig.from_pretrained(str(model)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or MOST_TOKENS


def _sampling(generation: Generation, seed: int) -> Sampling | None:
    if generation.temperature == 0:
        return None
    rng = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(1, generation.max_new_tokens, dtype=torch.float64, generator=rng)
    return Sampling(temperature=generation.temperature, uniforms=uniforms)
