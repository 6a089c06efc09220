"""What a plan refuses of the settings of what samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from alignment.config.faults import Fault, unread_notes
from alignment.config.launch import LaunchConfig
from alignment.config.sampling_engine import Engine, SamplingConfig
from alignment.engines.engine_environment import interpreter
from alignment.stages.base import Refusal


def sampling_faults(sampling: SamplingConfig, where: str) -> Iterator[Fault]:
    """Settings that have no effect, or contradict each other."""
    names = [field.name for field in fields(SamplingConfig) if field.name != "engine"]
    if sampling.engine is Engine.own:
        yield from unread_notes(sampling, type(sampling)(), names, where, "only engine 'vllm'")
        return
    if sampling.url is not None:
        of_own = ("python", "cache_gb", "gpu_share", "start_timeout")
        yield from unread_notes(sampling, type(sampling)(), of_own, where, "a server that the stage starts (no url)")
    else:
        yield from unread_notes(sampling, type(sampling)(), ("api_key_env",), where, "only a server at a url")


def sampling_refusals(sampling: SamplingConfig, launch: LaunchConfig) -> Iterator[Refusal]:
    """The server listens on one machine."""
    if sampling.engine is Engine.vllm and launch.backend.num_machines > 1:
        why = "the server listens only on one machine"
        yield Refusal(field="sampling.engine", why=why, instead="sampling.engine=own")


def check_engine(sampling: SamplingConfig, where: str) -> None:
    """Checks that this machine has the engine.

    Raises:
        ConfigError: there is no environment with vLLM.
    """
    if sampling.engine is Engine.vllm and sampling.url is None:
        interpreter(sampling.python, package="vllm", where=f"{where}.sampling.python")
