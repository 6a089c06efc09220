"""Checks a judge's settings when a run is planned: whether there are pairs to judge, and a way to judge them."""

from __future__ import annotations

from collections.abc import Iterator

from alignment.config.did_you_mean import suggestion
from alignment.config.evaluating import EndpointConfig, JudgeKind
from alignment.config.faults import Fault
from alignment.evaluation.endpoint_faults import client_missing, endpoint_faults
from alignment.evaluation.pairwise import pairs_of
from alignment.stages.evaluate.config import EvaluateConfig
from alignment.stages.evaluate.votes_file import people_faults


def judge_faults(stage: EvaluateConfig, where: str, *, hang_seconds: float) -> Iterator[Fault]:
    """All faults in the settings of an evaluation's judge; ``where`` is the stage's key.

    A stage that makes no progress for ``hang_seconds`` is stopped; 0 turns this off.
    """
    judge = stage.judge
    path = f"{where}.judge"
    if judge.kind is JudgeKind.none:
        if judge.pairs:
            yield Fault(where=f"{path}.pairs", message="unused, because judge.kind is 'none'; set judge.kind")
    else:
        yield from _pair_faults(stage, path)
    yield from people_faults(judge, path)
    if judge.kind is JudgeKind.metric and not stage.metrics:
        message = f"'metric' judges by the primary metric, and {where}.metrics is empty; name one"
        yield Fault(where=f"{path}.kind", message=message)
    if judge.kind is JudgeKind.reward and stage.reward is None:
        yield Fault(where=f"{path}.kind", message=f"'reward' judges by {where}.reward, which is null; name a model")
    if judge.kind is JudgeKind.endpoint:
        yield from endpoint_faults(judge.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        if message := client_missing("endpoint"):
            yield Fault(where=f"{path}.kind", message=message)
    elif judge.endpoint != EndpointConfig():
        message = f"unused; only judge.kind 'endpoint' uses it, and judge.kind is '{judge.kind.value}'"
        yield Fault(where=f"{path}.endpoint", message=message)


def _pair_faults(stage: EvaluateConfig, path: str) -> Iterator[Fault]:
    for number, pair in enumerate(stage.judge.pairs):
        for name, arm in (("arm", pair.arm), ("against", pair.against)):
            if arm not in stage.arms:
                message = f"{arm!r} is not an arm of this evaluation; {suggestion(arm, stage.arms)}"
                yield Fault(where=f"{path}.pairs[{number}].{name}", message=message)
        if pair.arm == pair.against:
            yield Fault(where=f"{path}.pairs[{number}]", message=f"{pair.arm!r} is compared with itself; name two arms")
    if not pairs_of(stage.judge, stage.arms, reference=stage.reference):
        message = "no trained arm can be compared with the reference or base+prompt; name pairs: [{arm: …, against: …}]"
        yield Fault(where=f"{path}.pairs", message=message)
