"""Renders messages with the tokenizer's chat template and cuts the text where the assistant's turns begin and end. A
turn is found by rendering prefixes: the text of the messages up to and including the turn, minus the text of the
messages before it with a generation prompt. The turn ends with its control token. Nothing is inferred from token ids,
because pad may equal EOS. Templates of thinking models change earlier turns when later ones follow: they drop thoughts,
or end a turn with another token. A conversation then becomes several texts, so that each answer is learned behind the
text that it is generated from. Control tokens that somebody wrote into a message stay text. A private-use character
replaces each of them before the template renders, so that all control tokens in the result are the template's own
(``encode`` restores the others)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from alignment.core.deadline import SECONDS, Bounded
from alignment.core.errors import AlignmentError, DataError, ModelError
from alignment.data.templates import Templates, each, options_of, trained_as, with_options
from alignment.data.tokens.thoughts import opened_once, with_readable_thought, without_thought
from alignment.data.turns import Message


def in_common(first: Sequence[object], second: Sequence[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


_SHOWN = 40
_KEEPS_TURNS = (
    "set model.chat_template=chatml, which renders every turn unchanged (but does not support tools), or "
    "path:FILE of a template that does"
)


def other_opening(templates: Templates, before: str, after: str, helps: Callable[[Templates], bool]) -> DataError:
    """The fault of a prompt ``before`` that is not the beginning of ``after``, the same turns with an answer. ``helps``
    says whether the answer could follow its prompt if these templates rendered both."""
    start = max(0, in_common(before, after) - _SHOWN // 2)
    working = [setting for setting, candidate in _candidates(templates) if helps(candidate)]
    remedies = [f"set {setting}" for setting in working] or [_KEEPS_TURNS]
    return DataError(
        "the chat template renders a prompt differently when an answer follows it: without the answer, the prompt "
        "ends with "
        f"{before[-_SHOWN:]!r}, and with the answer there is {after[start : start + _SHOWN]!r}",
        remedy=", or ".join(remedies),
    )


def _candidates(templates: Templates) -> Iterator[tuple[str, Templates]]:
    for name in sorted(name for name in options_of(templates) if "thinking" in name):
        for value in (False, True):
            yield f"model.template_options.{name}={str(value).lower()}", with_options(templates, {name: value})
    for source, text in filter(None, map(trained_as, each(templates))):
        yield f"model.chat_template={source}", text


Tools = Sequence[Mapping[str, Any]]
"""The tools that the assistant may call, in the form for chat templates."""
_PROBE = "[an answer]"
"""Shows what a template writes around an answer."""
LAST_STAND_IN = 0x10FFFD
"""The end of Unicode's last private-use area; icon fonts use the other areas."""
_ENDLESS = ModelError(
    f"the chat template ran for more than {SECONDS:g} s for one rendering",
    remedy="look for loops in the template, or set model.chat_template=chatml, or path:FILE of another",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Rendered text that is tokenised separately, and whether its tokens are learned."""

    text: str
    learned: bool


class ControlTokens:
    """The special tokens of a tokenizer, and the characters that replace them where they are ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(ids, key=len, reverse=True)
        self.ids = ids
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._stand_ins = {token: chr(LAST_STAND_IN - index) for index, token in enumerate(longest_first)}
        self._tokens = {ord(stand_in): token for token, stand_in in self._stand_ins.items()}
        self.unused = chr(LAST_STAND_IN - len(ids))
        """A private-use character that replaces no token."""
        self._used = re.compile("[" + "".join(self._stand_ins.values()) + "]" if ids else "(?!)")

    def escaped(self, value: Any) -> Any:
        """The value with control tokens replaced in every text inside it. Raises DataError: the value contains one of
        the private-use characters."""
        if isinstance(value, str):
            if value.isascii() and not self.pattern.search(value):
                return value
            if clash := self._used.search(value):
                raise DataError(
                    f"a text contains the private-use character U+{ord(clash[0]):X}", remedy="remove it from the row"
                )
            return self.pattern.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.escaped(key): self.escaped(item) for key, item in value.items()}
        return [self.escaped(item) for item in value] if isinstance(value, (list, tuple)) else value

    def is_escaped(self, text: str) -> bool:
        return not text.isascii() and self._used.search(text) is not None

    def restored(self, text: str) -> str:
        return text.translate(self._tokens)


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer: Any) -> ControlTokens:
    """The control tokens of a tokenizer, to which none may be added afterwards."""
    return ControlTokens(tokenizer)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    answering: bool,
    tools: Tools = (),
    templates: Templates | None = None,
) -> str:
    """The messages rendered by the chat template, or by other ``templates``. ``answering`` adds the opening of an
    assistant turn. Raises DataError: the tokenizer has no chat template, the template refuses these messages or leaves
    out tools or tool calls, or a message contains a reserved character. Raises ModelError: the template does not
    terminate. That is not the row's fault, so no other row is tried."""
    control, templates = control_tokens(tokenizer), templates or tokenizer.chat_template
    if not templates:
        raise DataError(
            "the tokenizer has no chat template", remedy="use a chat model, or set model.chat_template=chatml"
        )
    try:
        with Bounded(_ENDLESS):
            text = _applied(
                tokenizer,
                [with_readable_thought(templates, control.escaped(message.as_dict())) for message in messages],
                tools=control.escaped(list(tools)) or None,
                chat_template=templates if isinstance(templates, str) else None,
                tokenize=False,
                add_generation_prompt=answering,
            )
    except AlignmentError:
        raise
    except Exception as error:  # templates raise whatever they like
        raise DataError(f"the chat template refuses these messages: {error}") from error
    _refuse_lost_tools(text, messages, tools)
    return text


def _applied(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """The template applied to the turns; one that takes arguments of calls only as text, as DeepSeek's, gets JSON."""
    try:
        return str(tokenizer.apply_chat_template(turns, **options))
    except TypeError:
        as_text = [_with_arguments_as_text(turn) for turn in turns]
        if as_text == turns:
            raise
        return str(tokenizer.apply_chat_template(as_text, **options))


def _with_arguments_as_text(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for call in turn.get("tool_calls", ())
        if not isinstance(arguments := call["function"]["arguments"], str)
    ]
    return turn | {"tool_calls": calls} if calls else turn


def _refuse_lost_tools(text: str, messages: Sequence[Message], tools: Tools) -> None:
    """Most templates do not support tools and leave them out, so a model would learn to answer nothing."""
    for call in (*tools, *(call for message in messages for call in message.tool_calls)):
        name = str(call["function"]["name"])
        if json.dumps(name, ensure_ascii=False)[1:-1] not in text and name not in text:
            raise DataError(
                f"the chat template leaves out the tool '{name}'",
                remedy="use a model whose template supports tools, or use rows without tools",
            )


def conversation_texts(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[ConversationText]:
    """The texts that a conversation is learned from, which are one unless the template changes earlier turns. Each has
    alternating segments, up to the end of its last assistant turn: text before a turn, and the turn itself. Every
    assistant turn is learned in one of them. Raises DataError: there is no assistant turn to learn from, or the
    rendered text cannot be cut at turns."""
    texts: list[list[tuple[str, str, int]]] = [[]]  # the text before each answer, the answer, and its index
    rendered = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if index == 0:
            raise DataError("begins with an assistant turn, without a prompt before it")
        before = render(tokenizer, messages[:index], answering=True, tools=tools)
        try:
            answer = _answer_behind(before, tokenizer, messages[:index], message, tools)
        except DataError:
            if message.learned:
                raise
            continue  # it is context, and later prompts contain it as the template renders it there
        if not before.startswith(rendered):
            texts.append([])
            rendered = ""
        texts[-1].append((before[len(rendered) :], answer, index))
        rendered = before + answer
    learned = [_conversation_text(text, messages) for text in texts if any(messages[turn[-1]].learned for turn in text)]
    if not learned:
        raise DataError("no assistant turn to learn from")
    return learned


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationText:
    """One text of a conversation: ``segments``, and the turns ``before`` its last answer. It has ``answers`` that are
    learned, and other turns as their ``context``."""

    segments: list[Segment]
    before: Sequence[Message]
    answers: Sequence[Message]
    context: Sequence[Message]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


def _conversation_text(turns: Sequence[tuple[str, str, int]], messages: Sequence[Message]) -> ConversationText:
    learned = [index for *_, index in turns if messages[index].learned]
    last = turns[-1][-1]
    return ConversationText(
        segments=[
            segment
            for before, answer, index in turns
            for segment in (Segment(text=before, learned=False), Segment(text=answer, learned=index in learned))
        ],
        before=messages[:last],
        answers=[messages[index] for index in learned],
        context=[message for index, message in enumerate(messages[:last]) if index not in learned],
    )


def prompt_text(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> str:
    return render(tokenizer, messages, answering=True, tools=tools)


def prompt_and_answers(
    tokenizer: Any, messages: Sequence[Message], answers: Sequence[Message], tools: Tools = ()
) -> list[str]:
    """A rendered prompt, and behind it each of several ``answers`` to it, up to and including the end of the turn.
    Raises DataError: the template renders the prompt differently once an answer follows, or never ends the turn."""
    before = prompt_text(tokenizer, messages, tools)
    return [before, *(_answer_behind(before, tokenizer, messages, answer, tools) for answer in answers)]


def prompt_and_bare_answers(
    tokenizer: Any, messages: Sequence[Message], answers: Sequence[str], tools: Tools = ()
) -> list[str]:
    """A rendered prompt, and behind it the text alone of each of several ``answers`` to it. What the template writes
    before an answer, such as an empty thought, belongs to the prompt; a space belongs to the answer, whose first token
    it begins. What ends the turn is left out. Raises DataError: as ``prompt_and_answers``; or the template writes
    something else around each of the answers."""
    turns = [Message(role="assistant", content=content) for content in (_PROBE, *answers)]
    prompt, probe, *texts = prompt_and_answers(tokenizer, messages, turns, tools)
    opening, _, ending = probe.partition(_PROBE)
    opening = opening.rstrip(" ")
    if not all(text.startswith(opening) and text.endswith(ending) for text in texts):
        raise DataError(
            "the chat template writes different text around each of several answers",
            remedy="use another template (model.chat_template)",
        )
    return [prompt + opening, *(text[len(opening) : len(text) - len(ending)] for text in texts)]


def _answer_behind(before: str, tokenizer: Any, messages: Sequence[Message], answer: Message, tools: Tools) -> str:
    after = render(tokenizer, [*messages, answer], answering=False, tools=tools)
    if not after.startswith(before) and (bare := _without_thoughts(before, tokenizer, messages, tools)):
        before = bare  # gpt-oss drops the thoughts of calls once an answer follows; the prompt still has them
    if not after.startswith(before):
        helps = functools.partial(_follows, tokenizer, messages, answer, tools)
        raise other_opening(tokenizer.chat_template, before, after, helps)
    text = after[len(before) :]
    return opened_once(before, text[: _turn_end(tokenizer, text)])


def _without_thoughts(before: str, tokenizer: Any, messages: Sequence[Message], tools: Tools) -> str | None:
    """The prompt without its thoughts if it ends like ``before``, so that the same answer may follow both."""
    plain = [without_thought(message) for message in messages]
    if plain == list(messages):
        return None
    bare = render(tokenizer, plain, answering=True, tools=tools)
    return bare if in_common(before[::-1], bare[::-1]) > len(messages[-1].content) else None


def _follows(tokenizer: Any, messages: Sequence[Message], answer: Message, tools: Tools, templates: Templates) -> bool:
    try:
        before = render(tokenizer, messages, answering=True, tools=tools, templates=templates)
        after = render(tokenizer, [*messages, answer], answering=False, tools=tools, templates=templates)
    except DataError:
        return False
    return after.startswith(before)


def turn_end_token(tokenizer: Any) -> str:
    """The control token that ends an assistant's turn, also if no answer can follow the generation prompt. Raises
    DataError: see ``render``; or the template never ends the turn."""
    answer = "Hello."
    turns = [Message(role="user", content="Hi."), Message(role="assistant", content=answer)]
    _, _, text = render(tokenizer, turns, answering=False).rpartition(answer)
    return str(control_tokens(tokenizer).pattern.findall(text[: _turn_end(tokenizer, text)])[-1])


def _turn_end(tokenizer: Any, text: str) -> int:
    """The end of the turn: after EOS, or after the control token that the template uses instead (Gemma). Text after it
    (a line break in ChatML) does not belong to the answer."""
    matches = list(control_tokens(tokenizer).pattern.finditer(text))
    for match in reversed(matches):
        if match[0] == tokenizer.eos_token:
            return match.end()
    if not matches or text[matches[-1].end() :].strip():
        raise DataError("the chat template does not end an assistant turn with EOS or another control token")
    return matches[-1].end()


def prompt_tail(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> str | None:
    """The text that the template appends to the last turn's content, found with a marker; None if the marker is lost.
    Raises DataError: see ``render``."""
    mark = control_tokens(tokenizer).unused
    rendered = prompt_text(tokenizer, [*messages[:-1], replace(messages[-1], content=mark)], tools)
    before, mark_in_text, tail = rendered.partition(mark)
    return tail if mark_in_text and before and mark not in tail else None
