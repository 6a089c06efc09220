"""A judge or grader at an OpenAI-compatible chat endpoint: many calls at once, retried, and saved as they arrive.

Every reply is written to a file at once, keyed by the request; a stage that is started again requests only the rest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignment.config.evaluating import ChatEndpointConfig
from alignment.core.errors import ConfigError, StageError
from alignment.evaluation.bounded_client import Refused, bounded_client

log = logging.getLogger(__name__)

GIVE_UP = 8
"""After this many failed calls in a row, each tried several times, the endpoint is taken to be down."""

PACKAGE = "openai>=3,<4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The result of a call: the judge's ``text``, or the ``error`` of the last try."""

    text: str = ""
    error: str = ""


class Endpoint:
    """Sends prompts to the endpoint; ``replies`` is the file that its replies are saved in.

    ``where`` is the setting above ``endpoint``, whose last part names the endpoint's role. ``without`` says how to
    evaluate without it.
    """

    def __init__(
        self,
        config: ChatEndpointConfig,
        replies: Path,
        *,
        where: str,
        without: str = "judge.kind=none evaluates without a judge",
    ) -> None:
        """Raises ConfigError if the client is not installed, or the key's variable is not set."""
        self._config = config
        self._role = where.rpartition(".")[2] or "judge"
        self._without = without
        self._replies = replies
        self._where = where
        self._key = api_key(config, where=where)
        self._client = _client(config, self._key, where=where)

    def ask(self, prompts: Sequence[str], progress: Callable[[int], None]) -> list[str]:
        """The judge's reply to each prompt, in order; ``progress`` receives the number done so far.

        Raises:
            StageError: a call failed. All other calls are made first, unless ``GIVE_UP`` calls failed in a row.
        """
        known = _read(self._replies)
        keys = [self._key_of(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
        texts = {key: known[key] for key in keys if key in known}
        errors: list[str] = []
        for key, reply in self._ask_missing(missing):
            if reply.error:
                errors.append(reply.error)
            else:
                texts[key] = reply.text
            progress(len(texts) + len(errors))
        if errors:
            raise self._failure(len(errors), len(missing), errors[-1])
        return [texts[key] for key in keys]

    def _ask_missing(self, prompts: dict[str, str]) -> Iterator[tuple[str, Reply]]:
        """Keys and replies as they arrive; successful replies are saved first."""
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            calls: dict[Future[Reply], str] = {pool.submit(self._call, prompt): key for key, prompt in prompts.items()}
            in_a_row, done = 0, 0
            for call in as_completed(calls):
                reply, done = call.result(), done + 1
                in_a_row = in_a_row + 1 if reply.error else 0
                if in_a_row >= GIVE_UP:
                    raise self._failure(in_a_row, done, reply.error)
                if not reply.error:
                    self._write(calls[call], reply.text)
                yield calls[call], reply
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _call(self, prompt: str) -> Reply:
        from openai import OpenAIError

        try:
            answer = self._client.chat.completions.create(
                model=self._config.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=self._config.max_tokens,
            )
        except (OpenAIError, Refused, ValueError) as error:  # ValueError: the body is not JSON
            return Reply(error=self._shown(_reason(error)))
        try:
            return Reply(text=str(answer.choices[0].message.content or ""))
        except (AttributeError, IndexError, TypeError):
            return Reply(error=self._shown(f"the reply is not a chat completion: {answer!r}"))

    def _shown(self, error: str) -> str:
        """An error as one line, without the key, which some servers repeat in their messages."""
        line = " ".join(error.split())
        return (line.replace(self._key, "***") if self._key else line)[:300]

    def _failure(self, failed: int, calls: int, error: str) -> StageError:
        return StageError(
            f"{failed} of {calls} calls to the {self._role} at {self._config.base_url} failed; the last error: {error}",
            where=f"{self._where}.endpoint",
            remedy="check that the endpoint is up, serves this model and answers in time "
            f"({self._role}.endpoint.timeout), then run again: only missing replies are requested. {self._without}",
        )

    def _key_of(self, prompt: str) -> str:
        asked = [self._config.base_url, self._config.model, self._config.max_tokens, prompt]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _write(self, key: str, text: str) -> None:
        """Called by one thread only. A line starts with its line break, since the line before may have been cut off."""
        self._replies.parent.mkdir(parents=True, exist_ok=True)
        with self._replies.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"key": key, "text": text}))


def api_key(config: ChatEndpointConfig, *, where: str) -> str:
    """The key, or "" if the endpoint needs none.

    Raises:
        ConfigError: the environment variable is not set.
    """
    if config.api_key_env is None:
        return ""
    key = os.environ.get(config.api_key_env, "")
    if not key:
        raise ConfigError(
            f"the environment variable {config.api_key_env} is not set",
            where=f"{where}.endpoint.api_key_env",
            remedy=f"export {config.api_key_env}=…, or set it to null for an endpoint without a key",
        )
    return key


def _client(config: ChatEndpointConfig, key: str, *, where: str) -> Any:
    try:
        from openai import OpenAI
    except ImportError:
        raise ConfigError(
            "an endpoint needs the package openai, which is not installed",
            where=f"{where}.kind",
            remedy=f"pip install '{PACKAGE}'",
        ) from None
    with _without_variables():
        return OpenAI(
            base_url=config.base_url,
            api_key=key or "none",
            timeout=config.timeout,
            max_retries=config.retries,
            http_client=bounded_client(config.timeout),
        )


def _reason(error: Exception) -> str:
    """The error in words."""
    response = getattr(error, "response", None)
    if response is not None and 300 <= response.status_code < 400:
        target = urlsplit(response.headers.get("location", ""))
        origin = f"{target.scheme}://{target.netloc}" if target.netloc else "another path"
        return f"it redirects to {origin}; neither key nor prompts are sent there. If it is right, give it as base_url"
    return str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"


@contextmanager
def _without_variables() -> Iterator[None]:
    """Hides OPENAI_ variables: the client would read keys, names and headers from them and send them to any server."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("OPENAI_")}
    try:
        yield
    finally:
        os.environ.update(taken)


def _read(file: Path) -> dict[str, str]:
    """Replies by key; a line that was cut off when a stage was killed is skipped."""
    replies: dict[str, str] = {}
    if not file.is_file():
        return replies
    for line in filter(None, file.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            record = json.loads(line)
            replies[record["key"]] = record["text"]
        except (ValueError, KeyError, TypeError):
            log.warning("a line of %s cannot be read; its reply is requested again", file)
    return replies
