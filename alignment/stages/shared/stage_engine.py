"""The engine of a running stage: started by its main process, asked by all."""

from __future__ import annotations

from collections.abc import Callable

from alignment.config.sampling_engine import SamplingConfig
from alignment.engines.engine_session import EngineSession
from alignment.engines.vllm_server import VllmOptions
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

    ``options`` may write weights for it.

    Raises:
        ConfigError: there is no environment with vLLM.
        StageError: the server cannot be started.
    """
    context.progress("starting vLLM")

    def address() -> tuple[str, str]:
        if not context.is_main:
            return "", ""
        session.start(options())
        return session.address

    of_main = shared(address)[0]
    if not context.is_main:
        session.join(of_main)
