"""The client of a vLLM server: token ids in, token ids with log-probabilities out, and weights that follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from alignment.config.evaluating import CallsConfig
from alignment.config.launch import SamplingConfig
from alignment.core.errors import StageError
from alignment.evaluation.endpoint_client import open_client, reason

SEEDS = 2**48
"""Seeds are whole numbers from 0 to below this."""
TOKENS_A_REPLY = 8192
"""The most tokens of answers, each with its prompt, that are asked for in one call, unless one answer has more."""
OTHER_WEIGHTS = 0.5
"""A mean difference of log-probabilities, in nats per token, that no rounding explains."""
_WHOLE_DISTRIBUTION: Mapping[str, float] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sent with every call: a server at a ``url`` may have other defaults, from its model's generation config."""
_PATIENCE = 5.0
"""Seconds without a reply after which the stage reports that it waits; a call has a limit of its own."""


class CallFailed(Exception):
    """A call got no reply; says why. The server may have ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A prompt's token ids, and how many answers it gets. Answer i is sampled with the random seed ``seed + i``."""

    prompt: Sequence[int]
    answers: int
    seed: int


def asked_once(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Asked]:
    """One request for each run of equal prompts, with the seed of its first; ``seeds`` has one for each prompt."""
    runs = groupby(range(len(prompts)), key=lambda row: tuple(prompts[row]))
    requests = [list(rows) for _, rows in runs]
    return [Asked(prompt=prompts[rows[0]], answers=len(rows), seed=seeds[rows[0]]) for rows in requests]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAnswer:
    """Token ids with the end if there is one, and the log-probability of each, in nats, as it was sampled."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How answers are made. Above ``temperature`` 0 they are sampled from the whole distribution."""

    max_new_tokens: int
    temperature: float
    end_ids: Sequence[int]


class EngineClient:
    """Calls one server at ``url`` (without ``/v1``); ``where`` is the setting that it comes from."""

    def __init__(self, config: SamplingConfig, url: str, key: str, *, where: str) -> None:
        """Raises ConfigError if the package openai is not installed."""
        self._key = key
        self._where = where
        self._concurrency = config.concurrency
        calls = CallsConfig(base_url=url, timeout=config.timeout, retries=config.retries)
        self._client = open_client(calls, key, where=where, direct=True)

    def answers(
        self,
        model: str,
        asked: Sequence[Asked],
        generation: Generation,
        progress: Callable[[int], None] = lambda _: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> list[list[EngineAnswer]]:
        """The answers to each prompt, by the weights that the server calls ``model``. ``progress`` receives the number
        of answers in each reply; ``waiting`` is called every few seconds without one. Raises CallFailed: a call got no
        reply; StageError: a reply is not what was asked for, such as an answer of other weights."""
        calls = [
            (index, first, replace(whole, answers=min(size, whole.answers - first), seed=whole.seed + first))
            for index, (whole, size) in enumerate((whole, _answers_a_call(whole, generation)) for whole in asked)
            for first in range(0, whole.answers, size)
        ]
        replies: dict[tuple[int, int], list[EngineAnswer]] = {}
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            pending = {
                pool.submit(self._reply, model, part, generation): (index, first) for index, first, part in calls
            }
            while pending:
                arrived, _ = wait(pending, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
                if not arrived:
                    waiting()
                for future in arrived:
                    call = pending.pop(future)
                    replies[call] = future.result()
                    progress(len(replies[call]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        ordered: list[list[EngineAnswer]] = [[] for _ in asked]
        for index, first, _ in calls:
            ordered[index] += replies[index, first]
        return ordered

    def models(self) -> list[str]:
        """The names that the server answers to. Raises CallFailed: the call got no reply."""
        reply = self._call("get", "/v1/models")
        try:
            return [str(model["id"]) for model in reply["data"]]
        except (KeyError, TypeError) as error:
            raise CallFailed(f"/v1/models: its reply {_lacking(error)}") from error

    def load_adapter(self, name: str, folder: Path) -> None:
        self._call("post", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}, text=True)

    def unload_adapter(self, name: str) -> None:
        self._call("post", "/v1/unload_lora_adapter", {"lora_name": name}, text=True)

    def replace_weights(self, folder: Path, version: str) -> None:
        """Replaces all weights by those of a model's folder, and names them ``version``. Raises CallFailed: the server
        did not take them."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        self._call("post", "/collective_rpc", body)
        self.reset_prefix_cache()
        self._call("post", "/update_weight_version", {"new_version": version})

    def reset_prefix_cache(self) -> None:
        """Makes the server forget what it computed for earlier prompts. Raises CallFailed: the server did not, or was
        not started as one whose weights are replaced."""
        self._call("post", "/reset_prefix_cache", {})

    def weights_version(self) -> str:
        """The version that was named last. Raises CallFailed: the call got no reply."""
        reply = self._call("get", "/weight_info")
        try:
            return str(reply["weight_version"])
        except (KeyError, TypeError) as error:
            raise CallFailed(f"/weight_info: its reply {_lacking(error)}") from error

    def limit(self, seconds: float) -> None:
        """Waits no longer than this for a reply from here on, and calls no more than once."""
        self._client = self._client.with_options(timeout=seconds, max_retries=0)

    def close(self) -> None:
        self._client.close()

    def stream(self, model: str, asked: Asked, generation: Generation, on_token: Callable[[int], None]) -> None:
        """Calls ``on_token`` with each token of one answer as it arrives. Raises CallFailed: the server stopped
        replying; StageError: other weights answer."""
        from openai import OpenAIError, Stream

        body = _body(model, asked, generation) | {"stream": True}
        try:
            with self._client.post(
                "/v1/completions", cast_to=object, body=body, stream=True, stream_cls=Stream[object]
            ) as chunks:
                for chunk in chunks:
                    if chunk["model"] != model:
                        raise self._refused(WrongReply(f"came from the weights {chunk['model']!r}, not {model!r}"))
                    for token in chunk["choices"][0]["token_ids"] or ():
                        on_token(int(token))
        except (OpenAIError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise CallFailed(reason(error, key=self._key)) from error

    def _reply(self, model: str, asked: Asked, generation: Generation) -> list[EngineAnswer]:
        reply = self._call("post", "/v1/completions", _body(model, asked, generation))
        try:
            return checked(reply, model, asked, generation)
        except WrongReply as error:
            raise self._refused(error) from error
        except RecursionError as error:
            raise CallFailed(reason(error, key=self._key)) from error

    def _refused(self, error: WrongReply) -> StageError:
        return StageError(f"the engine's reply {error}", where=self._where, remedy=_REMEDY)

    def _call(self, verb: str, path: str, body: Mapping[str, object] | None = None, *, text: bool = False) -> Any:
        from openai import OpenAIError

        try:
            if verb == "get":
                return self._client.get(path, cast_to=object)
            return self._client.post(path, cast_to=str if text else object, body=body)
        except (OpenAIError, ValueError, RuntimeError) as error:  # the last from a client that was closed
            raise CallFailed(f"{path}: {reason(error, key=self._key)}") from error


class WrongReply(ValueError):
    """What is wrong with a reply."""


_REMEDY = (
    "it was not used for training; check that no other program uses this server, and that it was started as "
    "described in docs/engines.md"
)


def _answers_a_call(asked: Asked, generation: Generation) -> int:
    """A reply repeats the prompt with each answer. Of greedy answers vLLM gives one."""
    if generation.temperature == 0.0:
        return 1
    return max(1, TOKENS_A_REPLY // (generation.max_new_tokens + len(asked.prompt)))


def _body(model: str, asked: Asked, generation: Generation) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(asked.prompt),
        "n": asked.answers,
        "seed": asked.seed,
        "max_tokens": generation.max_new_tokens,
        "temperature": generation.temperature,
        **_WHOLE_DISTRIBUTION,
        "stop_token_ids": list(generation.end_ids),
        "ignore_eos": True,  # the end ids are all ends
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }


def checked(reply: Any, model: str, asked: Asked, generation: Generation) -> list[EngineAnswer]:
    """The answers of a reply to ``/v1/completions``. Raises WrongReply: other weights made it, or it is not what was
    asked for."""
    try:
        if reply["model"] != model:
            raise WrongReply(f"came from the weights {reply['model']!r}, not {model!r}")
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if len(choices) != asked.answers:
            raise WrongReply(f"has {len(choices)} answers, not {asked.answers}")
        return [_answer(choice, asked, generation) for choice in choices]
    except (KeyError, TypeError) as error:
        raise WrongReply(_lacking(error)) from error


def _lacking(error: Exception) -> str:
    return f"lacks what a vLLM server returns ({type(error).__name__}: {error})"


def _answer(choice: Mapping[str, Any], asked: Asked, generation: Generation) -> EngineAnswer:
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise WrongReply("has an invalid token")
    if choice["prompt_token_ids"] is not None and choice["prompt_token_ids"] != list(asked.prompt):
        raise WrongReply("is for another prompt")
    if not 1 <= len(ids) <= generation.max_new_tokens or len(logprobs) != len(ids):
        raise WrongReply(f"has {len(ids)} tokens and {len(logprobs)} log-probabilities")
    ends = frozenset(generation.end_ids)
    if any(token in ends for token in ids[:-1]) or (len(ids) < generation.max_new_tokens and ids[-1] not in ends):
        raise WrongReply("does not end with an end token")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) and value < 1e-3 for value in logprobs):
        raise WrongReply("has an invalid log-probability")
    return EngineAnswer(ids=list(ids), logprobs=[float(value) for value in logprobs])
