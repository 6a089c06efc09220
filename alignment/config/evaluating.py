"""Settings of evaluations: arms, judges, graders, gates, and the calls to their servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.data import DataConfig
from alignment.config.rules import FILLED, FRACTION, NOT_NEGATIVE, POSITIVE, SCORE, URL, VARIABLE


@dataclass(kw_only=True, slots=True)
class CallsConfig:
    """Where a server is, and how it is called.

    ``api_key_env`` names the environment variable that holds the key; the key itself is written nowhere. A call
    fails if nothing arrives for ``timeout`` seconds, and is retried ``retries`` times; the answer may be of any length.
    Redirects are not followed. ``concurrency`` calls run at once."""

    base_url: Annotated[str, URL] = ""
    api_key_env: Annotated[str | None, VARIABLE] = field(default=None, metadata={"identity": False})
    timeout: Annotated[float, POSITIVE] = field(default=60.0, metadata={"identity": False})
    retries: Annotated[int, NOT_NEGATIVE] = field(default=2, metadata={"identity": False})
    concurrency: Annotated[int, POSITIVE] = field(default=4, metadata={"identity": False})


PROMPTED = "base+prompt"
FEW_SHOT = "base+few-shot"
UNTRAINED_ARMS = ("base", PROMPTED, FEW_SHOT)
"""Arms of an evaluation that no stage has trained; the others name a stage, a folder or a hub's model."""


@dataclass(kw_only=True, slots=True)
class AnswersConfig:
    """How every arm answers. At ``temperature`` 0 it answers once, with the most likely tokens.

    Above 0 it samples ``per_prompt`` answers. At 1 these are samples of the policy itself, so they also estimate its KL
    divergence from the reference."""

    per_prompt: Annotated[int, POSITIVE] = 1
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0


@dataclass(kw_only=True, slots=True)
class FewShotConfig:
    """The arm ``base+few-shot``: ``count`` exchanges of ``data``, drawn once, precede every prompt.

    An exchange is a row with one user turn and its answer. Rows whose prompt is similar to a held-out one are not used.
    """

    count: Annotated[int, POSITIVE] = 3
    data: DataConfig = field(default_factory=DataConfig)


class JudgeKind(str, Enum):
    """``metric`` prefers the better score by the primary metric, ``reward`` the higher score of the reward model;
    ``endpoint`` asks a model, in both orders; ``people`` counts the votes of ``align judge``."""

    none = "none"
    metric = "metric"
    reward = "reward"
    endpoint = "endpoint"
    people = "people"


@dataclass(kw_only=True, slots=True)
class PairConfig:
    """Two arms, by their names; wins are counted for ``arm``."""

    arm: str = ""
    against: str = ""


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """What a run requires of its evaluation: ``arm`` is better than ``against`` by more than ``min_difference``.

    It is judged by the 95 % interval of the paired difference in ``metric``, by default the primary one: the whole
    interval must lie above ``min_difference``. A negative value says how much worse the arm may be."""

    arm: str = ""
    against: str = ""
    metric: str | None = None
    min_difference: Annotated[float, SCORE] = 0.0


@dataclass(kw_only=True, slots=True)
class ChatEndpointConfig(CallsConfig):
    """An OpenAI-compatible chat endpoint: ``base_url`` ends where ``/chat/completions`` begins.

    Answers are greedy and have at most ``max_tokens`` tokens."""

    model: str = ""
    max_tokens: Annotated[int, POSITIVE] = 512


@dataclass(kw_only=True, slots=True)
class EndpointConfig(ChatEndpointConfig):
    """A chat endpoint that judges pairs of answers; ``criteria`` says what it should look for."""

    criteria: Annotated[str, FILLED] = (
        "Prefer the answer that does what the request asks, is correct and complete, and invents nothing."
    )


@dataclass(kw_only=True, slots=True)
class LabelledConfig:
    """Pairs of answers from which people chose the better one, to compare the judge with people. Without a source there
    are none. At most ``max_prompts`` prompts are drawn, with one pair each."""

    data: DataConfig = field(default_factory=DataConfig)
    max_prompts: Annotated[int, POSITIVE] = 50


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """Pairwise win rates on at most ``max_prompts`` held-out prompts.

    Without ``pairs`` every trained arm is compared with the reference arm and ``base+prompt``. If more than the share
    ``max_invalid`` of a pair's verdicts is invalid, nothing is concluded about the pair. A failed call is not a
    verdict: the stage ends, and repeats the call when it is started again. The judge also judges the pairs in
    ``labelled``. With people, every prompt with a vote counts. ``votes`` is a file written by ``align judge``, by
    default the file of this run and stage; the fingerprint depends on its content."""

    kind: JudgeKind = JudgeKind.none
    pairs: list[PairConfig] = field(default_factory=list)
    max_prompts: Annotated[int, POSITIVE] = 200
    max_invalid: Annotated[float, FRACTION] = 0.2
    votes: str | None = field(default=None, metadata={"identity": False})
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    labelled: LabelledConfig = field(default_factory=LabelledConfig)


@dataclass(kw_only=True, slots=True)
class GradingConfig:
    """A model that grades answers from ``lowest`` to ``highest``.

    ``rubric`` says what earns which grade. With ``show_reference`` the grader sees the row's reference answer, where
    there is one."""

    endpoint: ChatEndpointConfig = field(default_factory=ChatEndpointConfig)
    rubric: Annotated[str, FILLED] = (
        "Grade how well the answer does what the request asks: whether it is correct, complete, to the point and "
        "invents nothing. The lowest grade is for an answer that is wrong or useless, the highest for one that could "
        "hardly be better."
    )
    lowest: Annotated[int, NOT_NEGATIVE] = 1
    highest: Annotated[int, POSITIVE] = 10
    show_reference: bool = False


@dataclass(kw_only=True, slots=True)
class GraderConfig(GradingConfig):
    """The model that grades answers for all metrics of the source ``grade``; a metric may have a rubric of its own.

    An arm does not get the metric if more than the share ``max_invalid`` of its replies have no grade."""

    max_invalid: Annotated[float, FRACTION] = 0.2


@dataclass(kw_only=True, slots=True)
class ScorerEndpointConfig(ChatEndpointConfig):
    """A chat endpoint whose address is not part of the fingerprint: a stage may continue with the same model at another
    address."""

    base_url: Annotated[str, URL] = field(default="", metadata={"identity": False})


@dataclass(kw_only=True, slots=True)
class ScorerGraderConfig(GradingConfig):
    """The model that grades answers for a scorer.

    ``ungraded`` is the score of an answer whose reply has no grade. Without it such a reply ends the stage."""

    endpoint: ScorerEndpointConfig = field(default_factory=ScorerEndpointConfig)
    ungraded: Annotated[float | None, SCORE] = None
