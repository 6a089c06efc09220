"""Settings of the source ``grade``: a model at an endpoint grades one answer at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.evaluating import ChatEndpointConfig
from alignment.config.rules import FILLED, FRACTION, NOT_NEGATIVE, POSITIVE, SCORE, URL


@dataclass(kw_only=True, slots=True)
class GradingConfig:
    """A model that grades answers from ``lowest`` to ``highest``.

    ``rubric`` says what earns which grade. With ``show_reference`` the grader sees the row's reference answer, where
    there is one.
    """

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

    An arm does not get the metric if more than the share ``max_invalid`` of its replies have no grade.
    """

    max_invalid: Annotated[float, FRACTION] = 0.2


@dataclass(kw_only=True, slots=True)
class ScorerEndpointConfig(ChatEndpointConfig):
    """A chat endpoint whose address is not part of the fingerprint: a stage may continue with the same model at another
    address.
    """

    base_url: Annotated[str, URL] = field(default="", metadata={"identity": False})


@dataclass(kw_only=True, slots=True)
class ScorerGraderConfig(GradingConfig):
    """The model that grades answers for a scorer.

    ``ungraded`` is the score of an answer whose reply has no grade. Without it such a reply ends the stage.
    """

    endpoint: ScorerEndpointConfig = field(default_factory=ScorerEndpointConfig)
    ungraded: Annotated[float | None, SCORE] = None
