"""Settings of the source ``server``: answers are scored by a reward model or classifier behind HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from alignment.config.calls import CallsConfig
from alignment.config.rules import FILLED, POSITIVE, URL


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
    model must have one output, which is used as the score unchanged. Each call sends ``batch_size`` answers.
    """

    base_url: Annotated[str, URL] = field(default="", metadata={"identity": False})
    api: ServerApi = ServerApi.scores
    model: str = ""
    label: Annotated[str | None, FILLED] = None
    batch_size: Annotated[int, POSITIVE] = field(default=16, metadata={"identity": False})
