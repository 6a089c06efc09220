"""Ollama's ``Modelfile`` beside a GGUF file: the model's own template and stops.

Without a TEMPLATE, Ollama looks for the nearest of some twenty templates that it knows, and takes none if the chat
template in the file is like none of them (ollama, server/model.go and template/template.go). So the template is
derived from the model's own, and is refused if it would write other prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from alignment.commands.export.gguf_form.chat_parts import Inexpressible, chat_parts, conversation
from alignment.commands.export.gguf_form.go_template import evaluated, template_of
from alignment.core.errors import DataError, ModelError
from alignment.data.templates import each
from alignment.data.tokens.rendering import render
from alignment.data.turns import Message

LARGEST_CONTEXT = 8192
"""Tokens that Ollama is asked to hold at most, because it reserves memory for all of them; chosen, not tuned."""

CONVERSATIONS = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user", "assistant", "user"),
)
"""The roles of conversations that a template must render as the model's own does."""
CONTENTS = (
    "Two lines.\nThe second one, with 'quotes', \"more\" and a \\ in it.",
    "{{ .Content }} {% if x %} {} %s",
    "Grüße an 東京 🙂",
    "#",
)


def modelfile(
    gguf_name: str, tokenizer: Any, *, stops: Sequence[str], context: int, adds_bos: bool
) -> tuple[str, list[str]]:
    """The file's text, and notes about what it cannot say.

    ``stops`` are the texts of the tokens that end an answer, ``context`` is the model's longest text in tokens, and
    ``adds_bos`` says that llama.cpp puts BOS in front of a prompt.

    Raises:
        ModelError: the chat template cannot be written in Ollama's language.
    """
    template, notes = "{{ .Prompt }}", ["the model has no chat template, so Ollama sends it plain prompts"]
    if tokenizer.chat_template:
        try:
            template, notes = ollama_template(tokenizer, bos=tokenizer.bos_token if adds_bos else "")
        except Inexpressible as error:
            raise ModelError(
                f"the chat template cannot be written for Ollama: {error}",
                remedy="add --no-modelfile; llama-server takes the chat template from the GGUF file as it is",
            ) from error
    lines = [
        "# ollama create NAME -f Modelfile",
        f"FROM ./{gguf_name}",
        f'TEMPLATE """{template}"""',
        *(f'PARAMETER stop "{stop}"' for stop in stops),
        f"PARAMETER num_ctx {min(context, LARGEST_CONTEXT)}",
        "PARAMETER repeat_penalty 1",  # older versions of Ollama penalise what a prompt contains
    ]
    return "\n".join(lines) + "\n", notes


def ollama_template(tokenizer: Any, *, bos: str) -> tuple[str, list[str]]:
    """The chat template in Ollama's language, and notes about what it leaves out.

    ``bos`` is what llama.cpp puts in front of a prompt; the template leaves it out, so that it stands there once.

    Raises:
        Inexpressible: it would write other prompts than the chat template.
    """
    parts = chat_parts(tokenizer).without_start(bos)
    template = template_of(parts)
    has_system = "system" in parts.turns
    for turns in _conversations(has_system=has_system):
        wanted = render(tokenizer, turns, answering=True)
        if bos + evaluated(template, turns) != wanted:
            raise Inexpressible(f"a conversation of {', '.join(turn.role for turn in turns)} is {wanted!r}")
    notes = [] if has_system else ["the chat template has no system turn, so Ollama ignores system messages"]
    if _trims(tokenizer):
        notes.append("the chat template strips whitespace around contents; Ollama does not")
    if any("tools" in text for text in each(tokenizer.chat_template)):
        notes.append("tools work with llama-server, not with the Modelfile")
    return template, notes


def _conversations(*, has_system: bool) -> Iterator[list[Message]]:
    for roles in CONVERSATIONS:
        if has_system or "system" not in roles:
            yield conversation(*roles)
            yield [
                Message(role=role, content=CONTENTS[(index + len(roles)) % len(CONTENTS)])
                for index, role in enumerate(roles)
            ]


def _trims(tokenizer: Any) -> bool:
    """Whether a content with blanks around it is rendered without them."""
    blanks = [Message(role="user", content="  two words \n")]
    try:
        return blanks[0].content not in render(tokenizer, blanks, answering=True)
    except DataError:
        return False
