"""Scorers behind HTTP: a server that gives scores, and a model at a chat endpoint that gives grades. Each reply is
saved as it arrives, by everything that it depends on: the prompt, the answer, and the settings of the scorer that count
in a fingerprint. So nothing is asked twice, not even by a stage that was killed. What is not a score never becomes one:
it ends the stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignment.config.evaluating import ScorerGraderConfig
from alignment.config.scoring import ServerConfig
from alignment.core.errors import RewardError
from alignment.core.fingerprint import digest
from alignment.evaluation.endpoint import Call, Endpoint, EndpointCalls, SavedReplies
from alignment.evaluation.endpoint_client import NoReply
from alignment.evaluation.verdicts import rubric_of
from alignment.rewards.rules.similarity import first_reference
from alignment.rewards.scorer_sources import GRADE, SERVER
from alignment.rewards.scorers import Answers, checked_number
from alignment.rewards.server_apis import APIS, Item


@dataclass(frozen=True, kw_only=True, slots=True)
class Asking:
    """What the scorers of a process share. ``replies`` are those that all attempts of the stage got. ``where`` is the
    stage's key. ``progress`` is called with each reply, so that a process that waits for a slow server does not count
    as stuck."""

    replies: SavedReplies
    where: str
    progress: Callable[[], None]


class ServerScorer:
    """Scores by a server; ``field`` is that of the scorer. Raises ConfigError: the client is not installed, or its key
    is not set."""

    def __init__(self, config: ServerConfig, field: str, asking: Asking) -> None:
        self._config = config
        self._api = APIS[config.api]
        self._asking = asking
        where = f"{asking.where}.{field}.server"
        self._source = f"{SERVER} {config.model}"
        self._calls = EndpointCalls(config, asking.replies, where=where, role="reward server", failure=RewardError)

    def scores(self, answers: Answers) -> Tensor:
        """``[answers]`` float64: what the server gave, asked once for equal answers to equal prompts. Raises
        RewardError: a call failed, or gave what is no score; the scores of the other calls are kept."""
        items = [Item(prompt=prompt, answer=text) for prompt, text in zip(answers.prompts, answers.texts, strict=True)]
        keys = [self._key_of(item) for item in items]
        item_of = dict(zip(keys, items, strict=True))
        size = 1 if self._api.single else self._config.batch_size

        def calls_for(missing: Sequence[str]) -> Iterator[tuple[Sequence[str], Call]]:
            for start in range(0, len(missing), size):
                part = missing[start : start + size]
                yield part, partial(self._ask, [item_of[key] for key in part])

        values = self._calls.values(keys, calls_for, lambda _: self._asking.progress())
        return torch.tensor(values, dtype=torch.float64)

    def _key_of(self, item: Item) -> str:
        body = self._api.body(self._config, [item])
        return digest([self._config, json.dumps(body, sort_keys=True)])

    def _ask(self, items: Sequence[Item], client: Any) -> list[float]:
        reply = client.post(self._api.path, cast_to=object, body=self._api.body(self._config, items))
        given = self._api.read(self._config, reply, len(items))
        try:
            return [
                checked_number(score, where=item.prompt.where, source=self._source)
                for score, item in zip(given, items, strict=True)
            ]
        except RewardError as error:  # so that the replies to the other calls are kept
            raise NoReply(error.message) from error


class GradeScorer:
    """Scores by the grades of a model; ``field`` is that of the scorer. Raises ConfigError: the client is not
    installed, or its key is not set."""

    def __init__(self, config: ScorerGraderConfig, field: str, asking: Asking) -> None:
        self._rubric = rubric_of(config)
        self._ungraded = config.ungraded
        self._asking = asking
        self._where = f"{asking.where}.{field}.grader"
        self._source = f"{GRADE} by {config.endpoint.model}"
        self._endpoint = Endpoint(config.endpoint, asking.replies, where=self._where, without="", failure=RewardError)

    def scores(self, answers: Answers) -> Tensor:
        """``[answers]`` float64: the grade of each, asked once for equal answers to equal prompts. Raises RewardError:
        a call failed, or a reply has no grade and ``ungraded`` is not set."""
        prompts = [
            self._rubric.prompt(prompt.messages, text, reference=first_reference(prompt), tools=prompt.tools)
            for prompt, text in zip(answers.prompts, answers.texts, strict=True)
        ]
        replies = self._endpoint.ask(prompts, lambda _: self._asking.progress())
        grades = [
            self._score(reply, where=prompt.where) for reply, prompt in zip(replies, answers.prompts, strict=True)
        ]
        return torch.tensor(grades, dtype=torch.float64)

    def _score(self, reply: str, *, where: str) -> float:
        grade = self._rubric.grade(reply)
        if grade is not None:
            return float(grade)
        if self._ungraded is None:
            raise RewardError(
                f"gave no grade for an answer to {where}; its reply ends with {reply[-80:]!r}",
                where=self._source,
                remedy=f"use a model that ends its reply with [[NUMBER]], give it more "
                f"{self._where}.endpoint.max_tokens, or "
                f"set {self._where}.ungraded to the score that such answers get; the stage then starts from the "
                f"beginning",
            )
        return self._ungraded
