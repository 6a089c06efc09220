"""The endpoints of ``transformers serve``: nothing that a request asks for is ignored, and a refusal has a reason."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from openai.types.chat import ChatCompletionMessageToolCall
from openai.types.completion_usage import CompletionUsage
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, ToolCall
from transformers.utils import logging

from alignment.commands.serve.answer_form import divided
from alignment.commands.serve.policy_generation import PolicyGeneration
from alignment.commands.serve.request_checks import (
    CHAT,
    COMPLETION,
    LIMITS,
    RESPONSE,
    refusal,
    refuse_unsupported,
    stops_of,
    turns_of,
)
from alignment.commands.serve.stop_texts import before_stops

_LOG = logging.get_logger(__name__)


class _Checked(BaseHandler):
    """Refuses what its endpoint does not support, and lets answers fill the context."""

    _asks: ClassVar[Mapping[str, Any]] = {}

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """The reply.

        Raises:
            HTTPException: status 400, the request is refused; 404, there is no such policy; 500, the answer failed.
        """
        try:
            return await super().handle_request(body, request_id)
        except HTTPException:
            raise
        except TemplateError as error:
            raise refusal(f"the policy's chat template refuses this conversation: {error}") from error
        except Exception as error:
            _LOG.error("a request failed", exc_info=error)
            raise HTTPException(status_code=500, detail=f"{type(error).__name__}: {error}") from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        refuse_unsupported(body, self._asks)

    def _build_generation_config(
        self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if all(body.get(name) is None for name in (*LIMITS, "generation_config")) or config.max_new_tokens is None:
            config.max_new_tokens = sys.maxsize  # what the context allows; transformers stops at 1,024
        return config

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Any) -> list[dict[str, Any]]:
        """The conversation as the chat template reads it."""
        return turns_of(messages)


class PolicyCompletions(_Checked, CompletionHandler):
    """``/v1/completions``."""

    _asks = COMPLETION

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        body["stop"] = stops_of(body) or None


class PolicyResponses(_Checked, ResponseHandler):
    """``/v1/responses``."""

    _asks = RESPONSE


class PolicyChat(_Checked, ChatCompletionHandler):
    """``/v1/chat/completions``."""

    _asks = CHAT

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        body["stop"] = stops_of(body) or None
        turns_of(body.get("messages"))

    async def _non_streaming(
        self,
        request_id: str,
        model: PreTrainedModel,
        processor: Any,
        model_id: str,
        inputs: Any,
        gen_config: GenerationConfig,
        gen_manager: PolicyGeneration,
        tools: Any = None,
    ) -> JSONResponse:
        text, prompt_tokens, ids = await gen_manager.generate_non_streaming(
            model, processor, inputs, gen_config, request_id=request_id
        )
        content, thoughts, calls = divided(processor, model, ids, inputs["input_ids"], text, tools)
        stops = gen_config.stop_strings or []
        whole = processor.decode(ids, skip_special_tokens=True)
        ends = gen_config.eos_token_id or model.generation_config.eos_token_id  # none in a configuration of the client
        ends = ends if isinstance(ends, list) else [ends]
        ended = ids[-1].item() in ends or before_stops(whole, stops) != whole
        usage = CompletionUsage(
            prompt_tokens=prompt_tokens, completion_tokens=len(ids), total_tokens=prompt_tokens + len(ids)
        )
        reply = self._build_completion(
            request_id,
            before_stops(content, stops),
            model_id,
            "tool_calls" if calls else "length" if len(ids) >= gen_config.max_new_tokens and not ended else "stop",
            usage=usage,
            tool_calls=[_call(call, f"{request_id}_tool_call_{number}") for number, call in enumerate(calls or ())]
            or None,
            reasoning_content=thoughts,
        )
        return JSONResponse(reply)


def _call(call: ToolCall, name: str) -> ChatCompletionMessageToolCall:
    function: Any = {"name": call.name, "arguments": call.arguments}
    return ChatCompletionMessageToolCall(id=name, type="function", function=function)
