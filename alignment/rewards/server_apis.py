"""What servers that score answers are sent, and what they answer (docs/rewards.md). Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.config.scoring import ServerApi, ServerConfig
from alignment.data.records import Prompt
from alignment.evaluation.endpoint_client import NoReply


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An answer to score, and its prompt."""

    prompt: Prompt
    answer: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [turn.as_dict() for turn in self.prompt.messages]

    @property
    def tools(self) -> dict[str, Any]:
        """The tools of the prompt as a field of a request, which a prompt without tools does not have."""
        return {"tools": list(self.prompt.tools)} if self.prompt.tools else {}

    @property
    def row(self) -> dict[str, Any]:
        """The prompt's row, with texts in place of values that JSON does not have, such as dates and NaN."""
        text = json.dumps(dict(self.prompt.row), default=str)
        row: dict[str, Any] = json.loads(text, parse_constant=str)
        return row

    @property
    def asked(self) -> str:
        """The prompt as one text: the contents of its turns, with blank lines between them."""
        return "\n\n".join(turn.content for turn in self.prompt.messages)


_Read = Callable[[ServerConfig, Any, int], list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Api:
    """``body`` is posted to ``path``; ``read`` gives a score for each item of the answer, as the server wrote it.
    ``read`` raises NoReply for an answer of another form. ``single``: a call has one item. ``labels``: it can score by
    one class of several."""

    path: str
    body: Callable[[ServerConfig, Sequence[Item]], dict[str, Any]]
    read: _Read
    single: bool = False
    labels: bool = False


def _scores_body(config: ServerConfig, items: Sequence[Item]) -> dict[str, Any]:
    return {
        "model": config.model,
        "items": [
            {"id": number, "messages": item.messages, **item.tools, "answer": item.answer, "row": item.row}
            for number, item in enumerate(items)
        ],
    }


def _pooling_body(config: ServerConfig, items: Sequence[Item]) -> dict[str, Any]:
    (item,) = items
    conversation = [*item.messages, {"role": "assistant", "content": item.answer}]
    # The request has no field for tools; vLLM passes these arguments on to the chat template.
    for_template = {"chat_template_kwargs": item.tools} if item.tools else {}
    return {
        "model": config.model,
        "messages": conversation,
        **for_template,
        "add_generation_prompt": False,
        "encoding_format": "float",
        **_activation(config),
    }


def _classify_body(config: ServerConfig, items: Sequence[Item]) -> dict[str, Any]:
    return {"model": config.model, "input": [item.answer for item in items], **_activation(config)}


def _pairs_body(config: ServerConfig, items: Sequence[Item]) -> dict[str, Any]:
    texts = {"text_1": [item.asked for item in items], "text_2": [item.answer for item in items]}
    return {"model": config.model, **texts, **_activation(config)}


def _activation(config: ServerConfig) -> dict[str, Any]:
    """A score without a label is the model's output itself, and not its sigmoid."""
    return {"use_activation": config.label is not None}


def _predict_body(config: ServerConfig, items: Sequence[Item]) -> dict[str, Any]:
    return {"inputs": [[item.answer] for item in items], "raw_scores": config.label is None, "truncate": False}


def _numbers_in(entries: str, order: str) -> _Read:
    """Reads replies whose ``entries`` have one score each, and their number in ``order``."""
    return lambda _, reply, count: [_get(entry, "score") for entry in _in_order(_get(reply, entries), count, order)]


def _outputs_in(outputs: str) -> _Read:
    """Reads replies of vLLM whose entries have the ``outputs`` of all classes."""

    def read(config: ServerConfig, reply: Any, count: int) -> list[Any]:
        entries = _in_order(_get(reply, "data"), count, "index")
        return [_one_of(config, _listed(_get(entry, outputs))) for entry in entries]

    return read


def _read_predictions(config: ServerConfig, reply: Any, count: int) -> list[Any]:
    return [_of_label(config, _listed(entry)) for entry in _counted(_listed(reply), count)]


def _of_label(config: ServerConfig, classes: list[Any]) -> Any:
    scores: dict[str, Any] = {}
    for one_class in classes:
        label = _get(one_class, "label")
        if not isinstance(label, str):
            raise NoReply(f"its reply has the wrong form: the label {label!r:.80} is not text")
        scores[label] = _get(one_class, "score")
    if config.label is None:
        return _only(list(scores.values()))
    if config.label not in scores:
        raise NoReply(f"it has no class {config.label!r}; it has {', '.join(map(repr, scores))}")
    return scores[config.label]


def _one_of(config: ServerConfig, outputs: list[Any]) -> Any:
    """The output of the label, which is the number of a class; without one, the only output."""
    if config.label is None:
        return _only(outputs)
    if int(config.label) >= len(outputs):
        raise NoReply(f"it has no class {config.label}; it has {len(outputs)}, numbered from 0")
    return outputs[int(config.label)]


def _only(outputs: list[Any]) -> Any:
    if len(outputs) != 1:
        raise NoReply(
            f"it returns {len(outputs)} numbers for an answer instead of one; for a classifier, label selects one"
        )
    return outputs[0]


def _in_order(entries: Any, count: int, key: str) -> list[Any]:
    counted = _counted(_listed(entries), count)
    order = [_get(entry, key) for entry in counted]
    if order != list(range(count)) or any(isinstance(number, bool) for number in order):
        raise NoReply(f"it returns the scores in a different order than the answers: '{key}' is {order!r:.80}")
    return counted


def _counted(entries: list[Any], count: int) -> list[Any]:
    if len(entries) != count:
        raise NoReply(f"it returns {len(entries)} scores for {count} answers")
    return entries


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise NoReply(f"its reply has the wrong form: {value!r:.80} is not a list")
    return value


def _get(entry: Any, key: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        raise NoReply(f"its reply has the wrong form: no '{key}' in {entry!r:.80}")
    return entry[key]


APIS: Mapping[ServerApi, Api] = {
    ServerApi.scores: Api(path="/scores", body=_scores_body, read=_numbers_in("scores", "id")),
    ServerApi.vllm_pooling: Api(
        path="/pooling", body=_pooling_body, read=_outputs_in("data"), single=True, labels=True
    ),
    ServerApi.vllm_classify: Api(path="/classify", body=_classify_body, read=_outputs_in("probs"), labels=True),
    ServerApi.vllm_score: Api(path="/score", body=_pairs_body, read=_numbers_in("data", "index")),
    ServerApi.tei_predict: Api(path="/predict", body=_predict_body, read=_read_predictions, labels=True),
}
NUMBERED = (ServerApi.vllm_pooling, ServerApi.vllm_classify)
"""Whose ``label`` is the number of a class."""
