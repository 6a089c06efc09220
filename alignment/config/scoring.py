"""Settings of scorers: their sources, reward servers, and the guard against over-optimisation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from alignment.config.evaluating import CallsConfig, ScorerGraderConfig
from alignment.config.rules import FILLED, NAME, NOT_NEGATIVE, PATTERN, PENALTY, POSITIVE, SCORE, URL, Rule
from alignment.core.fingerprint import IF_SET


class ServerApi(str, Enum):
    """What is sent to the server, and what it replies (docs/rewards.md).

    ``scores`` is this project's own API: ``POST /scores`` with conversations; the reply has a score for each.
    ``vllm_pooling``, ``vllm_classify`` and ``vllm_score`` belong to vLLM, ``tei_predict`` to text-embeddings-inference.
    """

    scores = "scores"
    vllm_pooling = "vllm_pooling"
    vllm_classify = "vllm_classify"
    vllm_score = "vllm_score"
    tei_predict = "tei_predict"


@dataclass(kw_only=True, slots=True)
class ServerConfig(CallsConfig):
    """A server that scores answers: ``base_url`` ends where the path of its ``api`` begins.

    ``model`` is the model's name. Of the model, a fingerprint includes only this name, so change the name when the
    model behind it changes. ``label`` names one class of a classifier, whose probability is the score. Without it the
    model must have one output, which is used as the score unchanged. Each call sends ``batch_size`` answers."""

    base_url: Annotated[str, URL] = field(default="", metadata={"identity": False})
    api: ServerApi = ServerApi.scores
    model: str = ""
    label: Annotated[str | None, FILLED] = None
    batch_size: Annotated[int, POSITIVE] = field(default=16, metadata={"identity": False})


MEAN, MAJORITY = "mean", "majority"
_PASS = re.compile(r"pass@([1-9][0-9]{0,3})")
AGGREGATE = Rule(
    lambda value: value in (MEAN, MAJORITY) or _PASS.fullmatch(value) is not None,
    f"{MEAN}, {MAJORITY}, or pass@K, such as pass@4",
    keywords={"pattern": f"^({MEAN}|{MAJORITY}|{_PASS.pattern})$"},
)


def pass_size(aggregate: str) -> int | None:
    """K of ``pass@K``; None for another aggregate."""
    match = _PASS.fullmatch(aggregate)
    return int(match[1]) if match else None


@dataclass(kw_only=True, slots=True)
class ScoreSourceConfig:
    """Where a score comes from.

    ``source`` is ``reward`` (the model that the stage's ``reward`` names), another reward model (``stage:NAME``,
    ``path:FOLDER``, ``hub:ORG/NAME@REVISION``), ``FILE.py:FUNCTION`` (your code), ``bundled:NAME.py:FUNCTION``,
    ``server`` (a reward model or classifier behind HTTP, which ``server`` describes), or a rule
    (alignment/rewards/rules): ``regex`` has a ``pattern``, ``length`` a ``target`` in words, ``json_schema`` a
    ``schema``."""

    source: str = ""
    pattern: Annotated[str | None, PATTERN] = None
    target: Annotated[int | None, POSITIVE] = None
    schema: dict[str, Any] | None = field(default=None, metadata=IF_SET)
    server: ServerConfig | None = field(default=None, metadata=IF_SET)


@dataclass(kw_only=True, slots=True)
class MemberConfig(ScoreSourceConfig):
    """A member of an ensemble: a scorer without a weight.

    ``source`` may also be ``grade``: a model at an endpoint grades each answer, as ``grader`` says. With ``normalize``
    the running mean is subtracted from scores, which are then divided by the running standard deviation; ``clip`` then
    limits the absolute value."""

    normalize: bool = False
    clip: Annotated[float | None, POSITIVE] = None
    grader: ScorerGraderConfig | None = field(default=None, metadata=IF_SET)


class Combine(str, Enum):
    """How the scores of several members become one.

    ``mean``; ``min``, worst-case optimisation (Coste et al. 2024); ``mean_minus_std``, the mean minus ``std_weight``
    times the members' standard deviation (Eisenstein et al. 2024)."""

    mean = "mean"
    min = "min"
    mean_minus_std = "mean_minus_std"


@dataclass(kw_only=True, slots=True)
class EnsembleConfig:
    """Several scorers whose scores become one, so that a policy gains little where they disagree.

    ``normalize`` and ``clip`` of a member are applied before its score is combined. Bradley-Terry models fix scores
    only up to a constant, so members that were trained separately should be normalised."""

    members: list[MemberConfig] = field(default_factory=list)
    combine: Combine = Combine.mean
    std_weight: Annotated[float, PENALTY] = 1.0


@dataclass(kw_only=True, slots=True)
class ScorerConfig(MemberConfig):
    """One part of an answer's score: ``weight`` times the score that ``source`` gives it.

    ``source`` may also be ``ensemble``, several scorers as ``ensemble`` describes them; ``normalize`` and ``clip`` then
    apply to their combined score."""

    source: str = "reward"
    weight: Annotated[float, SCORE] = 1.0
    ensemble: EnsembleConfig | None = field(default=None, metadata=IF_SET)


@dataclass(kw_only=True, slots=True)
class MetricConfig(ScoreSourceConfig):
    """A metric of an evaluation, shown under ``name``: the scores that ``source`` gives the answers.

    Two sources are only for metrics: ``choice``, and ``grade``, which asks the stage's ``grader``. A ``rubric`` is only
    for ``grade`` and replaces the grader's own.

    ``aggregate`` combines the scores of several answers to a prompt (``answers.per_prompt``) into one: their ``mean``;
    ``pass@K``, the probability that at least one of K answers is correct, which means a score of at least
    ``passing_score``; or ``majority``, the score of the most frequent final answer, for ``exact_answer``."""

    name: Annotated[str, NAME] = ""
    higher_is_better: bool = True
    aggregate: Annotated[str, AGGREGATE] = MEAN
    passing_score: Annotated[float, SCORE] = 1.0
    rubric: Annotated[str | None, FILLED] = field(default=None, metadata=IF_SET)


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """Watches for over-optimisation (Gao et al. 2022): scores that rise while a held-out scorer's do not.

    Every ``every`` updates (0: never) the policy answers ``prompts`` rows of the stage's data on which it is never
    trained. The stage's own scorers and the held-out ``scorer``, which has no default, judge the answers. With
    ``keep_best`` the stage keeps the policy that ``scorer`` rated best, not the last one; a later policy is better only
    if it gains more than a standard error, paired by prompt. Two rollout batches in a row with a mean KL above
    ``max_kl`` (nats per sequence) end the stage, even if ``every`` is 0. A policy above ``max_kl`` never counts as the
    best, but without ``every`` the stage keeps the policy that exceeded it. ``scorer`` is never normalised, and only
    the main process calls it."""

    every: Annotated[int, NOT_NEGATIVE] = 0
    prompts: Annotated[int, POSITIVE] = 64
    scorer: ScorerConfig = field(default_factory=lambda: ScorerConfig(source=""))
    keep_best: bool = True
    max_kl: Annotated[float | None, POSITIVE] = None
