"""What a plan refuses of an engine that samples for a stage, and what the stage's result says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alignment.config.adapter import AdapterKind
from alignment.config.faults import Fault, unread_notes
from alignment.config.sampling_engine import Engine, RolloutSamplingConfig
from alignment.engines.vllm_server import RANKS
from alignment.stages.base import Curve
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.shared.sampling_checks import sampling_faults

GAP, LARGEST_GAP, BEYOND = "engine/gap", "engine/gap_max", "engine/beyond"
"""The mean and the largest difference of a log-probability to the engine's, and the share beyond the bound."""
IMPORTANCE, CAPPED, STALENESS = "engine/importance", "engine/capped", "engine/staleness"
"""The mean importance weight, the share of weights at the cap, and the age in updates of the policy that sampled."""
OF_CAP = (IMPORTANCE, CAPPED)
"""Those that only an importance cap gives."""
OF_ENGINE = (GAP, LARGEST_GAP, BEYOND, *OF_CAP)
"""Those of the last update that are reported."""
WORRYING = 0.05
"""A mean difference in nats per token; rounding in bfloat16 made .039 on a model of 135 million parameters."""

_UNSERVED = {
    AdapterKind.dora: "vLLM does not support DoRA",
    AdapterKind.prefix: "vLLM does not support prefix adapters",
}


def engine_faults(config: PpoConfig, where: str) -> Iterator[Fault]:
    """Settings of the engine that cannot be right, or that it does not support."""
    sampling, field = config.sampling, f"{where}.sampling"
    yield from sampling_faults(sampling, field)
    if sampling.engine is Engine.own:
        own = ("importance_cap", "max_staleness", "gap_bound")
        yield from unread_notes(sampling, RolloutSamplingConfig(), own, field, "only engine 'vllm'")
        return
    if reason := _UNSERVED.get(config.adapter.kind):
        message = f"'vllm', but {reason}; use adapter=lora or adapter=full, or {field}.engine=own"
        yield Fault(where=f"{field}.engine", message=message)
    if config.adapter.kind is not AdapterKind.full and config.adapter.modules_to_save:
        message = (
            f"'vllm', which does not support adapters with modules_to_save; leave that setting out, or use "
            f"{field}.engine=own"
        )
        yield Fault(where=f"{field}.engine", message=message)
    if config.adapter.kind is not AdapterKind.full and config.adapter.rank > RANKS[-1]:
        message = f"{config.adapter.rank}, but vLLM supports at most {RANKS[-1]}; lower it, or use {field}.engine=own"
        yield Fault(where=f"{where}.adapter.rank", message=message)
    if sampling.max_staleness and sampling.importance_cap is None:
        message = (
            "1, so answers come from an earlier policy, and nothing corrects for that; set importance_cap, such as 2.0"
        )
        yield Fault(where=f"{field}.max_staleness", message=message)


def reported_of_engine(sampling: RolloutSamplingConfig) -> tuple[str, ...]:
    """Metrics of the last update that an engine adds."""
    if sampling.engine is Engine.own:
        return ()
    return tuple(name for name in OF_ENGINE if name not in OF_CAP or sampling.importance_cap is not None)


def engine_notes(config: PpoConfig, weights: int | None) -> Iterator[str]:
    """What an engine costs, and what it changes."""
    if config.sampling.engine is Engine.own:
        return
    size = "" if weights is None else f", {weights / 1e9:.2g} GB"
    if config.adapter.kind is AdapterKind.full:
        yield (
            f"vLLM has its own copy of the weights, and after each of {config.updates} updates all of them{size} "
            f"are written to a file for it; with adapter=lora, only the adapter is"
        )
    else:
        yield f"vLLM has its own copy of the frozen weights{size}"
    if config.sampling.max_staleness:
        yield "answers are sampled by the previous policy while the current update is computed"


def engine_doubts(metrics: Mapping[str, float]) -> list[str]:
    """Warnings about a policy that learned from an engine's answers."""
    if metrics.get(GAP, 0.0) <= WORRYING or CAPPED in metrics:
        return []
    return [
        f"the engine that sampled gave log-probabilities that differ from the policy's by {metrics[GAP]:.3f} nats "
        f"per token ({metrics.get(BEYOND, 0.0):.0%} beyond the bound), and nothing corrected for that: the policy "
        f"learned from another policy's answers; set sampling.importance_cap, or sampling.engine=own"
    ]


def engine_curves() -> list[Curve]:
    """Charts of an engine; they are empty without one."""
    return [
        Curve(
            title="Gap to the engine",
            unit="nats per token: difference of log-probabilities, mean and largest",
            keys=(GAP, LARGEST_GAP),
            labels=("mean", "largest"),
        ),
        Curve(
            title="Importance weights",
            unit="mean weight, and share of tokens at the cap",
            keys=OF_CAP,
            labels=("mean", "at the cap"),
        ),
    ]
