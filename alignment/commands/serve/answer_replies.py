"""Answers in the form of OpenAI's replies: whole, and as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

from transformers.cli.serving.utils import ReasoningText, ToolCall

from alignment.commands.serve.policy_generation import Ended


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
