"""The app behind ``align serve`` with the default engine: policies in this process, each under its own name.

It answers as OpenAI's API does, also where it refuses. The work of a request ends when its client goes away.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers.cli.serving.utils import ReasoningText, ToolCall

from alignment.commands.serve import request_checks as checks
from alignment.commands.serve.loaded_arms import LoadedArm
from alignment.commands.serve.policy_generation import Ended, Piece, PolicyGeneration
from alignment.commands.serve.request_checks import AnswerOptions, KnownFields, RequestError
from alignment.commands.shared.page_server import HOSTS
from alignment.engines.server_process import HOST

_OBJECTS = {
    True: ("chatcmpl", "chat.completion", "chat.completion.chunk"),
    False: ("cmpl", "text_completion", "text_completion"),
}
"""Of a chat, or of a completion: how an id begins, and OpenAI's names of a whole reply and of a piece."""


class Reply:
    """The reply to one request, in the form of ``/v1/chat/completions`` or of ``/v1/completions``, by the policy that
    is served as ``model``."""

    def __init__(self, model: str, *, is_chat: bool) -> None:
        prefix, self._object, self._chunk_object = _OBJECTS[is_chat]
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())
        self._is_chat = is_chat
        self._calls = 0

    def whole(self, ended: Ended) -> dict[str, Any]:
        """The answer at once."""
        content: dict[str, Any] = {"text": ended.content}
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": ended.content, "refusal": None}
            message |= {} if ended.thoughts is None else {"reasoning_content": ended.thoughts}
            message |= {"tool_calls": list(map(self._call, ended.calls))} if ended.calls else {}
            content = {"message": message}
        return self._reply(self._object, content, ended.reason, ended)

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream has before its first piece: the role."""
        if self._is_chat:
            yield self._reply(self._chunk_object, {"delta": {"role": "assistant", "content": ""}})

    def chunks(self, piece: Piece, *, with_usage: bool) -> Iterator[dict[str, Any]]:
        """What a stream has of a piece; behind the last one also the numbers of tokens, if the client asks for them."""
        if isinstance(piece, Ended):
            yield self._reply(self._chunk_object, {"delta": {}} if self._is_chat else {"text": ""}, piece.reason)
            if with_usage:
                yield self._reply(self._chunk_object, None, usage=piece)
        elif piece:
            yield self._reply(self._chunk_object, {"delta": self._delta(piece)} if self._is_chat else {"text": piece})

    def _delta(self, piece: ToolCall | str) -> dict[str, Any]:
        if isinstance(piece, ToolCall):
            return {"tool_calls": [{"index": self._calls, **self._call(piece)}]}
        return {"reasoning_content" if isinstance(piece, ReasoningText) else "content": piece}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        self._calls += 1
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{self._id}_{self._calls}", "type": "function", "function": function}

    def _reply(
        self, kind: str, content: Mapping[str, Any] | None, reason: str | None = None, usage: Ended | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, **(content or {}), "logprobs": None, "finish_reason": reason}
        reply: dict[str, Any] = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        reply["choices"] = [] if content is None else [choice]
        if usage is not None:
            prompt, answer = usage.prompt_tokens, usage.tokens
            reply["usage"] = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return reply


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
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
        ]

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _models(self, _: Request) -> Response:
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "alignment"} for name in self._policies]
        return JSONResponse({"object": "list", "data": models})

    async def _chat(self, request: Request) -> Response:
        body = await _body(request)
        policy, options = self._checked(body, checks.CHAT)
        text = checks.prompt_of(body, policy.tokenizer, positions=policy.positions, reads_calls=policy.reads_calls)
        pieces = policy.pieces(text, options, checks.tools_of(body), is_chat=True)
        return await _reply(request, pieces, options, Reply(body["model"], is_chat=True))

    async def _completion(self, request: Request) -> Response:
        body = await _body(request)
        policy, options = self._checked(body, checks.COMPLETION)
        if not isinstance(body.get("prompt"), str):
            raise RequestError("the prompt is not a text", param="prompt")
        pieces = policy.pieces(body["prompt"], options, is_chat=False)
        return await _reply(request, pieces, options, Reply(body["model"], is_chat=False))

    def _checked(self, body: Mapping[str, Any], fields: KnownFields) -> tuple[PolicyGeneration, AnswerOptions]:
        name = body.get("model")
        if not isinstance(name, str):
            raise RequestError("model: name the policy", param="model")
        if name not in self._policies:
            names = ", ".join(self._policies)
            raise RequestError(f"there is no model {name!r} here, only: {names}", param="model", status=404)
        checks.refuse_unsupported(body, fields)
        return self._policies[name], checks.options_of(body, len(self._policies[name].tokenizer))


async def _body(request: Request) -> dict[str, Any]:
    """The fields of a request. Pages of other sites cannot send this type unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the header Content-Type is not application/json", status=415)
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MOST_BYTES:
            raise RequestError(f"the body has more than {MOST_BYTES:,} bytes", status=413)
    return checks.body_of(bytes(raw))


async def _reply(request: Request, pieces: Any, options: AnswerOptions, reply: Reply) -> Response:
    """The answer at once, or as a stream that begins when the prompt is taken."""
    if not options.is_streamed:
        return JSONResponse(await _unless_left(request, _whole(pieces, reply)))
    await _unless_left(request, anext(pieces))
    return StreamingResponse(_events(pieces, options, reply), media_type="text/event-stream")


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` returns; it is cancelled if the client goes away. Raises ClientDisconnect: it has gone."""
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
        return reply.whole([piece async for piece in pieces][-1])


async def _events(pieces: Any, options: AnswerOptions, reply: Reply) -> AsyncIterator[str]:
    """The events of a stream. An error ends it, because its status has been sent."""
    async with aclosing(pieces):
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for piece in pieces:
                for chunk in reply.chunks(piece, with_usage=options.streams_usage):
                    yield _event(chunk)
        except RequestError as error:
            yield _event(_fault(error))
    yield "data: [DONE]\n\n"


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _fault(error: Exception) -> dict[str, Any]:
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


def application(arms: Sequence[LoadedArm]) -> Starlette:
    """The ASGI app."""

    async def forget(*_: Any) -> Response:
        return Response(status_code=499)  # nobody reads it

    # A web page that points its own name at 127.0.0.1 is refused by that name.
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS, www_redirect=False)]
    handlers: Any = {404: _refuse_path, 405: _refuse_path, RequestError: _refuse, Exception: _refuse}
    handlers[ClientDisconnect] = forget
    return Starlette(routes=PolicyApp(arms).routes(), middleware=middleware, exception_handlers=handlers)


def serve(arms: Sequence[LoadedArm], port: int) -> None:
    """Answers requests until the process is asked to end."""
    uvicorn.run(application(arms), host=HOST, port=port, log_level="warning", access_log=False)
