"""The small part of Go's template language in which a Modelfile's TEMPLATE is written here, and its evaluation.

``template_of`` writes a template, ``evaluated`` renders it as Ollama does, whose variables are ``.Messages`` with
``.Role`` and ``.Content`` (ollama, docs/template.mdx). Anything else is refused, so an evaluation shows what Ollama
would send to the model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from alignment.commands.export.gguf_form.chat_parts import ROLES, ChatParts
from alignment.data.turns import Message

_RANGE = "range $index, $message := .Messages"
_FIRST = "if eq $index 0"
_NOT_SYSTEM = 'if ne .Role "system"'
_ROLE = re.compile(r'(?:else )?if eq \.Role "(\w+)"')
_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)


def template_of(parts: ChatParts) -> str:
    """A template that writes the parts around the contents."""
    default = _inside(_NOT_SYSTEM, _literal(parts.default_system)) if parts.default_system else ""
    start = _literal(parts.begin) + default
    first = _inside(_FIRST, start) if start else ""
    branches = [
        f'if eq .Role "{role}" }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}'
        for role in ROLES
        if role in parts.turns
        for before, after in [parts.turns[role]]
    ]
    turn = "{{ " + "{{ else ".join(branches) + "{{ end }}"
    return _inside(_RANGE, first + turn) + _literal(parts.answer)


def _inside(opening: str, body: str) -> str:
    return f"{{{{ {opening} }}}}{body}{{{{ end }}}}"


def _literal(text: str) -> str:
    """The text as it is; as a quoted string if the template or the Modelfile would read it otherwise.

    A Modelfile loses characters that Go does not call printable, and ends a text at three quotation marks.
    """
    if not text or (all(letter.isprintable() or letter == "\n" for letter in text) and not re.search('[{}"]', text)):
        return text
    return f'{{{{ "{"".join(map(_escaped, text))}" }}}}'


def _escaped(letter: str) -> str:
    """A character inside a quoted string, in escapes that Go and Python share."""
    if letter.isprintable() and letter not in '{}"\\':
        return letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 1 << 16 else f"\\U{ord(letter):08x}"


def evaluated(template: str, messages: Sequence[Message]) -> str:
    """The template rendered with these messages.

    Raises:
        ValueError: the template contains something else than ``template_of`` writes.
    """
    pieces = _ACTION.split(template)  # texts and actions alternate
    if any("{{" in text or "}}" in text for text in pieces[::2]):
        raise ValueError("an action is not of the known form")
    begin = pieces.index(_RANGE)
    end = _end_of(pieces, begin)
    if any(pieces[1:begin:2]):
        raise ValueError("an action in front of the turns")
    turns = [_body(pieces[begin + 1 : end], index, message) for index, message in enumerate(messages)]
    return "".join(pieces[:begin]) + "".join(turns) + _body(pieces[end + 1 :], -1, None)


def _end_of(pieces: Sequence[str], begin: int) -> int:
    """The index of the ``end`` that closes the block that begins at ``begin``."""
    depth = 0
    for index in range(begin, len(pieces), 2):
        depth += pieces[index].startswith(("range ", "if "))
        depth -= pieces[index] == "end"
        if depth == 0:
            return index
    raise ValueError("a block has no end")


def _body(pieces: Sequence[str], index: int, message: Message | None) -> str:
    """Texts and actions of one turn; ``message`` is None behind the turns."""
    written = [pieces[0]]
    at = 1
    while at < len(pieces):
        action = pieces[at]
        if action.startswith('"'):
            written += [ast.literal_eval(action), pieces[at + 1]]
        elif action == ".Content" and message is not None:
            written += [message.content, pieces[at + 1]]
        elif action.startswith("if ") and message is not None:
            end = _end_of(pieces, at)
            written += [_chosen(pieces[at:end], index, message), pieces[end + 1]]
            at = end
        else:
            raise ValueError(f"the action {action!r} is not known")
        at += 2
    return "".join(written)


def _chosen(block: Sequence[str], index: int, message: Message) -> str:
    """The branch of ``if … else if …`` whose condition holds; ``block`` has no ``end``."""
    starts = [0]
    depth = 0
    for at in range(2, len(block), 2):
        depth += block[at].startswith("if ")
        depth -= block[at] == "end"
        if depth == 0 and block[at].startswith("else "):
            starts.append(at)
    for start, stop in zip(starts, [*starts[1:], len(block)], strict=True):
        if _holds(block[start], index, message):
            return _body(block[start + 1 : stop], index, message)
    return ""


def _holds(condition: str, index: int, message: Message) -> bool:
    if condition == _FIRST:
        return index == 0
    if condition == _NOT_SYSTEM:
        return message.role != "system"
    role = _ROLE.fullmatch(condition)
    if role is None:
        raise ValueError(f"the condition {condition!r} is not known")
    return message.role == role[1]
