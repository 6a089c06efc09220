"""Settings of metrics of the source ``grade``: a model at an endpoint grades one answer at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from alignment.config.evaluating import ChatEndpointConfig
from alignment.config.rules import FILLED, FRACTION, NOT_NEGATIVE, POSITIVE


@dataclass(kw_only=True, slots=True)
class GraderConfig:
    """The model that grades answers for all metrics of the source ``grade``, from ``lowest`` to ``highest``.

    ``rubric`` says what earns which grade; a metric may have a rubric of its own. With ``show_reference`` the grader
    sees the row's reference answer, where there is one. An arm with more than a share of ``max_invalid`` of replies
    without a grade has no such metric.
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
    max_invalid: Annotated[float, FRACTION] = 0.2
