"""A judge or grader at an OpenAI-compatible chat endpoint.

Every reply is written to a file at once, keyed by the request; a stage that is started again requests only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from alignment.config.evaluating import ChatEndpointConfig
from alignment.core.errors import StageError
from alignment.core.fingerprint import digest
from alignment.evaluation.endpoint_calls import Call, EndpointCalls
from alignment.evaluation.endpoint_client import NoReply
from alignment.evaluation.saved_replies import SavedReplies


class Endpoint:
    """Sends prompts to the endpoint.

    ``where`` is the setting above ``endpoint``, whose last part names the endpoint's role. ``without`` says how to do
    without it. A failure is an error of the type ``failure``.
    """

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
        """The judge's reply to each prompt, in order; ``progress`` receives the number done so far.

        Raises:
            StageError: a call failed. All other calls are made first, unless too many failed in a row.
        """
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
