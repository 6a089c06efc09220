"""The engine that samples for a stage, if it is not the policy itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alignment.config.adapter import AdapterKind
from alignment.config.sampling_engine import Engine
from alignment.engines.completions import Generation
from alignment.engines.engine_session import EngineSession
from alignment.engines.vllm_server import VllmOptions
from alignment.models.assembly.engine_weights import write_base
from alignment.models.assembly.load import DTYPES, Lineage
from alignment.models.assembly.roles import Roles
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.shared.stage_engine import session_of, start_engine
from alignment.training.context import StageContext
from alignment.training.rl.rollouts import Prompts
from alignment.training.rl.served_engine import ServedEngine


@contextmanager
def served_engine(
    config: PpoConfig,
    context: StageContext,
    roles: Roles,
    start: Lineage,
    *prompts: Prompts,
    end_ids: frozenset[int],
) -> Iterator[ServedEngine | None]:
    """The engine, until the block ends; None if the policy samples.

    The main process starts it, and the others ask it. ``prompts`` are all that will be asked.

    Raises:
        ConfigError: there is no environment with vLLM.
        StageError: the server cannot be started.
    """
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
