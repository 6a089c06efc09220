"""Asks a model at an endpoint, and saves its replies so that none is asked for twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from alignment.config.evaluating import CallsConfig, ChatEndpointConfig
from alignment.core.errors import StageError
from alignment.core.files import parse_json
from alignment.core.fingerprint import digest
from alignment.evaluation.endpoint_client import NoReply, api_key, open_client, reason

log = logging.getLogger(__name__)


class SavedReplies:
    """Replies by the key of what was asked. New ones are appended to ``file``, which no other process may write; those
    in the files ``others`` are known too."""

    def __init__(self, file: Path, others: Sequence[Path] = ()) -> None:
        self._file = file
        self._known = {key: value for each in (*others, file) for key, value in _lines(each)}

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def save(self, key: str, value: Any) -> None:
        """Adds a reply. Called by one thread only. A line starts with its line break, since the line before may have
        been cut off."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"key": key, "value": value}))
        self._known[key] = value


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        return
    for line in filter(None, file.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = parse_json(line)
            yield record["key"], record["value"]
        except (ValueError, KeyError, TypeError):
            log.warning("a line of %s cannot be read; its reply will be requested again", file)


GIVE_UP = 8
"""After this many failed calls in a row, each tried several times, the endpoint is taken to be down."""

Call = Callable[[Any], Sequence[Any]]
"""Asks the client it is given; returns a value for each key of the call. Raises ValueError for what is no reply."""


_Reply = tuple[Sequence[Any], str]
"""The result of a call: a value for each of its keys, or none and the error of its last try."""


class EndpointCalls:
    """Calls one server. ``where`` is the setting that ``config`` comes from, and ``role`` what the server is.
    ``without`` says how to do without it. A failure is an error of the type ``failure``."""

    def __init__(
        self,
        config: CallsConfig,
        replies: SavedReplies,
        *,
        where: str,
        role: str,
        without: str = "",
        failure: type[StageError] = StageError,
    ) -> None:
        """Raises ConfigError if the client is not installed, or the key's variable is not set."""
        self._config = config
        self._replies = replies
        self._where = where
        self._role = role
        self._without = without
        self._failure_type = failure
        self._key = api_key(config.api_key_env, where=f"{where}.api_key_env")
        self._client = open_client(config, self._key, where=where)

    def values(
        self,
        keys: Sequence[str],
        calls_for: Callable[[Sequence[str]], Iterable[tuple[Sequence[str], Call]]],
        progress: Callable[[int], None],
    ) -> list[Any]:
        """The value of each key, in order; ``progress`` receives how many different ones are known so far.
        ``calls_for`` divides the keys without a saved value, each once, into calls. Raises StageError: a call failed.
        All other calls are made first, unless ``GIVE_UP`` calls failed in a row."""
        different = dict.fromkeys(keys)
        missing = [key for key in different if key not in self._replies]
        done, errors, calls = len(different) - len(missing), [], list(calls_for(missing)) if missing else []
        for asked, error in self._replies_to(calls):
            errors += [error] if error else []
            done += len(asked)
            progress(done)
        if errors:
            raise self._failure(len(errors), len(calls), errors[-1])
        return [self._replies[key] for key in keys]

    def _replies_to(self, calls: Sequence[tuple[Sequence[str], Call]]) -> Iterator[tuple[Sequence[str], str]]:
        """Keys and errors as replies arrive; what was answered is saved first."""
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            pending = {pool.submit(self._reply, call, len(asked)): asked for asked, call in calls}
            in_a_row, done = 0, 0
            for future in as_completed(pending):
                (values, error), done = future.result(), done + 1
                in_a_row = in_a_row + 1 if error else 0
                if in_a_row >= GIVE_UP:
                    raise self._failure(in_a_row, done, error)
                for key, value in zip(pending[future], values, strict=bool(values)):
                    self._replies.save(key, value)
                yield pending[future], error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, call: Call, count: int) -> _Reply:
        from openai import OpenAIError

        try:
            values = call(self._client)
        except (OpenAIError, ValueError, RecursionError) as error:  # a body that is not JSON, or not a reply
            return (), reason(error, key=self._key)
        assert len(values) == count, "a call gives a value for each of its keys"
        return values, ""

    def _failure(self, failed: int, calls: int, error: str) -> StageError:
        return self._failure_type(
            f"{failed} of {calls} calls to the {self._role} at {self._config.base_url} failed; the last error was: "
            f"{error}",
            where=self._where,
            remedy=f"check that it is up, serves this model and answers in time ({self._where}.timeout), then run "
            f"again: only the missing replies are requested. {self._without}".rstrip(),
        )


class Endpoint:
    """Sends prompts to the endpoint. ``where`` is the setting above ``endpoint``, whose last part names the endpoint's
    role. ``without`` says how to do without it. A failure is an error of the type ``failure``."""

    def __init__(
        self,
        config: ChatEndpointConfig,
        replies: SavedReplies,
        *,
        where: str,
        without: str = "judge.kind=none evaluates without a judge",
        failure: type[StageError] = StageError,
    ) -> None:
        """Raises ConfigError if the client is not installed, or the key's variable is not set."""
        self._config = config
        role = where.rpartition(".")[2] or "judge"
        self._calls = EndpointCalls(
            config, replies, where=f"{where}.endpoint", role=role, without=without, failure=failure
        )

    def ask(self, prompts: Sequence[str], progress: Callable[[int], None]) -> list[str]:
        """The judge's reply to each prompt, in order; ``progress`` receives the number done so far. Raises StageError:
        a call failed. All other calls are made first, unless too many failed in a row."""
        keys = [self._key_of(prompt) for prompt in prompts]
        prompt_of = dict(zip(keys, prompts, strict=True))

        def calls_for(missing: Sequence[str]) -> Iterator[tuple[list[str], Call]]:
            for key in missing:
                yield [key], partial(self._reply, prompt_of[key])

        return self._calls.values(keys, calls_for, progress)

    def _reply(self, prompt: str, client: Any) -> list[str]:
        answer = client.chat.completions.create(
            model=self._config.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=self._config.max_tokens,
        )
        try:
            return [str(answer.choices[0].message.content or "")]
        except (AttributeError, IndexError, TypeError):
            raise NoReply(f"the reply is not a chat completion: {answer!r}") from None

    def _key_of(self, prompt: str) -> str:
        """Who is asked counts as far as it counts in a fingerprint: the address of a judge does, a scorer's does
        not."""
        return digest([self._config, prompt])
