"""The app behind ``align serve`` with the default engine: policies in this process, each under its own name.

It answers as OpenAI's API does, also where it refuses. The work of a request ends when its client goes away.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.utils import ReasoningText, ToolCall

from alignment.commands.serve.loaded_arms import LoadedArm
from alignment.commands.serve.policy_generation import Begun, Ended, Piece, PolicyGeneration, Prompt
from alignment.commands.serve.request_checks import (
    CHAT_FIELDS,
    CHAT_UNSUPPORTED,
    COMPLETION_FIELDS,
    COMPLETION_UNSUPPORTED,
    AnswerOptions,
    RequestError,
    body_of,
    options_of,
    prompt_of,
    refuse_unsupported,
    tools_of,
)
from alignment.commands.shared.guarded_app import HOSTS
from alignment.engines.server_process import HOST


class Reply(ABC):
    """The reply to one request, by the policy that is served as ``model``."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._model = model
        self._created = int(time.time())

    def whole(self, ended: Ended) -> dict[str, Any]:
        """The answer at once."""
        return self._reply(self.whole_object, [_choice(self._answer(ended), ended.reason)], _usage(ended))

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """The chunks before the first piece."""
        return []

    def chunk(self, piece: ToolCall | str) -> dict[str, Any]:
        """A piece of a stream."""
        return self._reply(self.chunk_object, [_choice(self._piece(piece), None)], None)

    def ending(self, ended: Ended) -> dict[str, Any]:
        """Why a stream ended."""
        return self._reply(self.chunk_object, [_choice(self._piece(""), ended.reason)], None)

    def usage(self, ended: Ended) -> dict[str, Any]:
        """The chunk with the numbers of tokens, for a client that asks for it."""
        return self._reply(self.chunk_object, [], _usage(ended))

    @abstractmethod
    def _answer(self, ended: Ended) -> dict[str, Any]:
        """The part of a choice that has the whole answer."""

    @abstractmethod
    def _piece(self, piece: ToolCall | str) -> dict[str, Any]:
        """The part of a choice that has a piece; an empty text where there is none."""

    def _reply(self, kind: str, choices: Sequence[Any], usage: Mapping[str, int] | None) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **({"usage": usage} if usage else {})}


@final
class CompletionReply(Reply):
    """Of ``/v1/completions``."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _answer(self, ended: Ended) -> dict[str, Any]:
        return {"text": ended.content}

    def _piece(self, piece: ToolCall | str) -> dict[str, Any]:
        return {"text": piece}


@final
class ChatReply(Reply):
    """Of ``/v1/chat/completions``."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._calls = 0

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """The role comes first."""
        return [self._reply(self.chunk_object, [_choice({"delta": {"role": "assistant", "content": ""}}, None)], None)]

    def _answer(self, ended: Ended) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ended.content, "refusal": None}
        if ended.thoughts is not None:
            message["reasoning_content"] = ended.thoughts
        if ended.calls:
            message["tool_calls"] = [self._call(call) for call in ended.calls]
        return {"message": message}

    def _piece(self, piece: ToolCall | str) -> dict[str, Any]:
        if isinstance(piece, ToolCall):
            return {"delta": {"tool_calls": [{"index": self._calls, **self._call(piece)}]}}
        name = "reasoning_content" if isinstance(piece, ReasoningText) else "content"
        return {"delta": {name: piece} if piece else {}}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{self.id}_{self._calls}", "type": "function", "function": function}


def _choice(content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": reason}


def _usage(ended: Ended) -> dict[str, int]:
    total = ended.prompt_tokens + ended.tokens
    return {"prompt_tokens": ended.prompt_tokens, "completion_tokens": ended.tokens, "total_tokens": total}


MOST_BYTES = 4 * 2**20
"""Of the body of a request: more text than the contexts of today's models hold."""
T = TypeVar("T")


class PolicyApp:
    """The endpoints of these arms."""

    def __init__(self, arms: Sequence[LoadedArm]) -> None:
        self._policies = {arm.name: PolicyGeneration(arm) for arm in arms}

    def routes(self) -> list[Route]:
        """The paths that are answered."""
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
        ]

    async def health(self, _: Request) -> Response:
        """Whether the server answers."""
        return JSONResponse({"status": "ok"})

    async def models(self, _: Request) -> Response:
        """The names of the policies."""
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "alignment"} for name in self._policies]
        return JSONResponse({"object": "list", "data": models})

    async def chat(self, request: Request) -> Response:
        """Answers a conversation, which the policy's chat template renders."""
        body = await _body(request)
        policy = self._policy(body)
        refuse_unsupported(body, CHAT_FIELDS, CHAT_UNSUPPORTED)
        options = options_of(body, len(policy.tokenizer))
        text = prompt_of(body, policy.tokenizer, positions=policy.positions, reads_calls=policy.reads_calls)
        pieces = policy.pieces(Prompt(text=text, is_chat=True), options, tools_of(body.get("tools")))
        return await _reply(request, pieces, options, ChatReply(body["model"]))

    async def completion(self, request: Request) -> Response:
        """Continues a text."""
        body = await _body(request)
        policy = self._policy(body)
        refuse_unsupported(body, COMPLETION_FIELDS, COMPLETION_UNSUPPORTED)
        options = options_of(body, len(policy.tokenizer))
        if not isinstance(body.get("prompt"), str):
            raise RequestError("the prompt is not a text", param="prompt")
        pieces = policy.pieces(Prompt(text=body["prompt"], is_chat=False), options)
        return await _reply(request, pieces, options, CompletionReply(body["model"]))

    def _policy(self, body: Mapping[str, Any]) -> PolicyGeneration:
        name = body.get("model")
        if not isinstance(name, str):
            raise RequestError("model: name the policy", param="model")
        if name not in self._policies:
            names = ", ".join(self._policies)
            raise RequestError(f"there is no model {name!r} here, only: {names}", param="model", status=404)
        return self._policies[name]


async def _body(request: Request) -> dict[str, Any]:
    """The fields of a request. Pages of other sites cannot send this type unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the header Content-Type is not application/json", status=415)
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MOST_BYTES:
            raise RequestError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    return body_of(bytes(raw))


async def _reply(request: Request, pieces: Any, options: AnswerOptions, reply: Reply) -> Response:
    """The answer at once, or as a stream that begins when the prompt is taken."""
    if not options.is_streamed:
        return JSONResponse(await _unless_left(request, _whole(pieces, reply)))
    await _unless_left(request, anext(pieces))
    return StreamingResponse(_events(pieces, options, reply), media_type="text/event-stream")


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` returns; it is cancelled if the client goes away.

    Raises:
        ClientDisconnect: it has gone.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        left.cancel()
        task.cancel()
        await asyncio.wait({task, left})


async def _whole(pieces: Any, reply: Reply) -> dict[str, Any]:
    async with aclosing(pieces):
        ended = [piece async for piece in pieces if isinstance(piece, Ended)]
    return reply.whole(ended[0])


async def _events(pieces: Any, options: AnswerOptions, reply: Reply) -> AsyncIterator[str]:
    """The events of a stream. An error ends it, because its status has been sent."""
    async with aclosing(pieces):
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for piece in pieces:
                for chunk in _chunks(piece, options, reply):
                    yield _event(chunk)
        except RequestError as error:
            yield _event(_fault(error))
    yield "data: [DONE]\n\n"


def _chunks(piece: Piece, options: AnswerOptions, reply: Reply) -> Sequence[Mapping[str, Any]]:
    if isinstance(piece, Begun):
        return []
    if isinstance(piece, Ended):
        return [reply.ending(piece), *([reply.usage(piece)] if options.streams_usage else [])]
    return [reply.chunk(piece)]


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _fault(error: Exception) -> dict[str, Any]:
    """An error in the form of OpenAI."""
    known = error if isinstance(error, RequestError) else RequestError(f"{type(error).__name__}: {error}", status=500)
    kind = "server_error" if known.status >= 500 else "invalid_request_error"
    return {"error": {"message": known.message, "type": kind, "param": known.param, "code": known.status}}


async def _refuse(_: Request, error: Exception) -> Response:
    body = _fault(error)
    return JSONResponse(body, status_code=body["error"]["code"])


async def _refuse_path(request: Request, error: HTTPException) -> Response:
    paths = "GET /v1/models, POST /v1/chat/completions and POST /v1/completions"
    message = f"there is no {request.method} {request.url.path} here, only {paths}"
    return await _refuse(request, RequestError(message, status=error.status_code))


async def _forget(_: Request, __: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


def application(arms: Sequence[LoadedArm]) -> Starlette:
    """The ASGI app."""
    # A web page that points its own name at 127.0.0.1 is refused by that name.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)]
    handlers: Any = {
        404: _refuse_path,
        405: _refuse_path,
        RequestError: _refuse,
        ClientDisconnect: _forget,
        Exception: _refuse,
    }
    return Starlette(routes=PolicyApp(arms).routes(), middleware=middleware, exception_handlers=handlers)


def serve(arms: Sequence[LoadedArm], port: int) -> None:
    """Answers requests until the process is asked to end."""
    uvicorn.run(application(arms), host=HOST, port=port, log_level="warning", access_log=False)
