"""Answers of one policy, one request after the other, in a thread of its own that ends an answer nobody waits for."""

from __future__ import annotations

import asyncio
import copy
import logging
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn import ModuleList
from transformers import GenerationConfig, PreTrainedModel
from transformers.cli.serving import utils as serving
from transformers.cli.serving.utils import ReasoningText, ToolCall
from transformers.generation.streamers import BaseStreamer

from alignment.commands.serve.loaded_arms import LoadedArm
from alignment.commands.serve.request_checks import AnswerOptions, RequestError
from alignment.data.tokens.tokenize import encode
from alignment.models.assembly.prefix import positions_of

_CALL = "<tool_call>"
"""Opens a call, a JSON object, in the templates of Qwen and of models that follow it."""
_WITH_CALLS: Any = SimpleNamespace(config=SimpleNamespace(model_type="qwen3"))
"""Stands for a model whose calls have that form."""


def answer_reader(tokenizer: Any, model: PreTrainedModel, end_ids: Iterable[int], *, with_tools: bool) -> Any:
    """A copy of the tokenizer that divides answers in the form of this kind of model, if transformers knows it.
    ``with_tools``: where it knows none, calls are read in the form that the chat template writes. By itself,
    transformers knows the ends of the kind's first models, and returns any other as text. Of several texts, such as
    those before and after a call, it keeps the last. Without a form, an answer is all text."""
    reader = copy.copy(tokenizer)
    form = serving.get_response_template(tokenizer, model)
    if form is None and with_tools:
        template = tokenizer.get_chat_template(tools=[{}])
        writes_calls = _CALL in template and "<function=" not in template
        form = serving.get_response_template(tokenizer, _WITH_CALLS) if writes_calls else None
    if form is not None:
        reader.response_template = _with_ends(form, tokenizer, end_ids)
    return reader


def _with_ends(known: Mapping[str, Any], tokenizer: Any, end_ids: Iterable[int]) -> Mapping[str, Any]:
    content = known.get("fields", {}).get("content")
    if content is None or "open" in content or "open_pattern" in content:
        return known
    form = copy.deepcopy(dict(known))
    ends = [re.escape(tokenizer.convert_ids_to_tokens(end)) for end in end_ids]
    literal = content.get("close", [])
    ends += [re.escape(text) for text in ([literal] if isinstance(literal, str) else literal)]
    pattern = rf"\s*(?:{'|'.join(ends)})"
    if "close_pattern" in content:
        pattern = f"{pattern}|{content['close_pattern']}"
    rest = {key: value for key, value in content.items() if key != "close"}
    form["fields"]["content"] = rest | {"close_pattern": pattern, "repeats": True, "join": "\n"}
    return form


def divided(
    reader: Any, model: PreTrainedModel, ids: Any, prompt_ids: Any, text: str, tools: Any
) -> tuple[str, str | None, list[ToolCall]]:
    """Content, thoughts and calls. An answer that cannot be divided, such as a call that was cut off, is all text, and
    so is one without a ``reader``."""
    if reader is None:
        return text, None, []
    try:
        content, thoughts, calls = serving.parse_assistant_message(
            reader, model, ids, input_ids=prompt_ids, cleaned_content=text, tools=tools
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        _LOG.error(f"an answer is returned as text, because it cannot be divided: {error}")
        return text, None, []
    return content, thoughts, calls or []


def before_stops(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of ``stops`` in it."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=len(text))]


class StopCut:
    """Cuts a text that comes in pieces; what may be the beginning of a stop is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.has_ended = False

    def after(self, piece: str) -> str:
        """What is certain of the answer after this piece and was not returned before."""
        if self.has_ended:
            return ""
        text = self._held + piece
        before = before_stops(text, self._stops)
        if len(before) < len(text):
            self.has_ended, self._held = True, ""
            return before
        certain = len(text) - self._beginning_of_a_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back when the answer ended."""
        held, self._held = self._held, ""
        return held

    def _beginning_of_a_stop(self, text: str) -> int:
        longest = max(map(len, self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((size for size in lengths if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A whole answer, the numbers of its tokens and of the prompt's, and why it ended."""

    content: str
    thoughts: str | None
    calls: Sequence[ToolCall]
    prompt_tokens: int
    tokens: int
    reason: str


Piece: TypeAlias = Ended | ToolCall | str
"""Of an answer: an empty text once the prompt is taken, texts and calls as they are generated if they are streamed, and
``Ended``."""


class PolicyGeneration:
    """Answers with one policy. Only its thread uses the tokenizer, which does not allow two at once."""

    def __init__(self, arm: LoadedArm) -> None:
        self.tokenizer = arm.tokenizer
        self._model = arm.model
        ends = arm.model.generation_config.eos_token_id
        self._readers = {
            with_tools: answer_reader(arm.tokenizer, arm.model, ends, with_tools=with_tools)
            for with_tools in (False, True)
        }
        form = getattr(self._readers[True], "response_template", None) or {}
        self.reads_calls = "tool_calls" in form.get("fields", {})
        self._thread = ThreadPoolExecutor(1)
        self._is_left: Callable[[], bool] = bool
        for layers in (module for module in arm.model.modules() if isinstance(module, ModuleList)):
            for layer in layers:
                layer.register_forward_pre_hook(self._end_if_left)

    @property
    def positions(self) -> int:
        """How many tokens the context has."""
        return positions_of(self._model.base_model)

    async def pieces(
        self, prompt: str, options: AnswerOptions, tools: Sequence[Mapping[str, Any]] = (), *, is_chat: bool
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer to a conversation that the chat template rendered, which ``Ended`` divides into
        content, thoughts and calls, or to any other text. Closing the iterator ends the work. Raises RequestError."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()
        is_left = threading.Event()

        def emit(piece: Piece | None) -> None:
            with suppress(RuntimeError):  # the server ends, and its loop is closed
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        reader = self._readers[bool(tools)] if is_chat else None
        work: Future[None] = self._thread.submit(
            self._answer, prompt, options, tools, reader, emit=emit, is_left=is_left.is_set
        )
        work.add_done_callback(lambda _: emit(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            error = None if work.cancelled() else work.exception()
            if isinstance(error, RequestError):
                raise error
            if error is not None:
                _LOG.error("an answer failed", exc_info=error)
                raise RequestError(f"{type(error).__name__}: {error}", status=500) from error
        finally:
            is_left.set()
            work.cancel()

    def _answer(
        self,
        prompt: str,
        options: AnswerOptions,
        tools: Sequence[Mapping[str, Any]],
        reader: Any,
        *,
        emit: Callable[[Piece], None],
        is_left: Callable[[], bool],
    ) -> None:
        # In front of a text the tokenizer may put BOS; a chat template writes its own.
        ids = list(self.tokenizer(prompt)["input_ids"]) if reader is None else encode(self.tokenizer, prompt)
        self._refuse_length(len(ids), "prompt" if reader is None else "messages")
        config = self._config(options, len(ids))
        emit("")
        input_ids = torch.tensor([ids], device=self._model.device)
        answer = _Answer(self.tokenizer, options, emit, self._end_if_left)
        if reader is not None and options.is_streamed:
            answer.parser = serving.build_response_parser(reader, self._model, input_ids, tools=list(tools) or None)
        if options.seed is not None:
            torch.manual_seed(options.seed)
        self._is_left = is_left
        try:
            with suppress(_AnswerOver):
                mask = torch.ones_like(input_ids)
                self._model.generate(
                    input_ids=input_ids, attention_mask=mask, generation_config=config, streamer=answer
                )
        finally:
            self._is_left = bool
        if not is_left():
            answer.finish()
            emit(self._ended(answer, input_ids, reader, tools, config.max_new_tokens))

    def _end_if_left(self, *_: Any) -> None:
        """Before each layer: reading a long prompt takes many times as long as a token."""
        if self._is_left():
            raise _AnswerOver

    def _refuse_length(self, prompt_tokens: int, field: str) -> None:
        if not prompt_tokens:
            raise RequestError("the prompt has no token", param=field)
        if prompt_tokens >= self.positions:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and the context of this policy {self.positions}, which leaves "
                "no room for an answer; shorten it",
                param=field,
            )

    def _config(self, options: AnswerOptions, prompt_tokens: int) -> GenerationConfig:
        config = copy.deepcopy(self._model.generation_config)
        room = self.positions - prompt_tokens
        config.max_new_tokens = min(options.max_tokens or room, room)
        config.top_p = options.top_p
        if options.temperature == 0:
            config.do_sample = False
        else:
            config.temperature = options.temperature
        if options.bias:
            config.sequence_bias = {(token,): bias for token, bias in options.bias.items()}
        return config

    def _ended(
        self, answer: _Answer, input_ids: Tensor, reader: Any, tools: Sequence[Mapping[str, Any]], limit: int
    ) -> Ended:
        text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
        content, thoughts, calls = divided(reader, self._model, answer.ids, input_ids, text, tools=list(tools) or None)
        is_cut = len(answer.ids) >= limit and not answer.has_ended(self._model.generation_config.eos_token_id)
        return Ended(
            content=before_stops(content, answer.stops),
            thoughts=thoughts,
            calls=calls,
            prompt_tokens=input_ids.shape[1],
            tokens=len(answer.ids),
            reason="tool_calls" if calls else "length" if is_cut else "stop",
        )


class _AnswerOver(Exception):
    """Ends the generation of an answer: a stop was written, or nobody waits for it."""


class _Answer(BaseStreamer):
    """The tokens of an answer, of which each is passed on as text if the answer is streamed."""

    def __init__(
        self, tokenizer: Any, options: AnswerOptions, emit: Callable[[Piece], None], end_if_left: Callable[[], None]
    ) -> None:
        self.ids: list[int] = []
        self.stops = options.stops
        self.parser: Any = None
        self._backend = tokenizer.backend_tokenizer
        self._plain = DecodeStream([], skip_special_tokens=True)
        self._with_control = DecodeStream([], skip_special_tokens=False)
        self._ends = StopCut(options.stops)
        self._content = StopCut(options.stops)
        self._emit = emit if options.is_streamed else lambda _: None
        self._end_if_left = end_if_left
        self._prompt_follows = True

    def put(self, value: Tensor) -> None:
        """Takes a token; what comes first is the prompt."""
        self._end_if_left()
        if self._prompt_follows:
            self._prompt_follows = False
            if self.parser is not None:
                self._pass_on(serving.response_events_to_chunks(self.parser.initial_events))
            return
        for token in value.tolist():
            self._add(token)

    def end(self) -> None:
        """``finish`` does what is left, also for an answer that ends at a stop."""

    def finish(self) -> None:
        if self.parser is not None:
            with suppress(ValueError, RuntimeError):  # the answer ends within a call
                self._pass_on(serving.response_events_to_chunks(self.parser.finalize()[1]))
        if rest := self._content.rest():
            self._emit(rest)

    def has_ended(self, end_ids: Sequence[int]) -> bool:
        return self._ends.has_ended or bool(self.ids and self.ids[-1] in end_ids)

    def _add(self, token: int) -> None:
        self.ids.append(token)
        plain = self._plain.step(self._backend, token) or ""
        self._ends.after(plain)
        if self.parser is None:
            self._pass_on([plain])
        elif text := self._with_control.step(self._backend, token):
            self._pass_on(serving.response_events_to_chunks(self.parser.feed(text)))
        if self._ends.has_ended:
            raise _AnswerOver

    def _pass_on(self, pieces: Sequence[Any]) -> None:
        for piece in pieces:
            if isinstance(piece, (ReasoningText, ToolCall)):
                self._emit(piece)
            elif text := self._content.after(piece):
                self._emit(text)
