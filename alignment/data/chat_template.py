"""Chat templates that replace the tokenizer's own: ChatML, or the user's.

ChatML is for base models. If the vocabulary has ChatML's control tokens, they are used, and the one that ends a turn
becomes EOS. Otherwise a turn opens with the same words as ordinary text and ends with the tokenizer's EOS. No token is
new, so no embedding has to be trained, and an adapter is enough.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.core.errors import DataError
from alignment.core.small_files import small_text
from alignment.data.tokens.rendering import control_tokens
from alignment.data.tokens.tokenize import front

CHATML = "chatml"
_START, _END = "<|im_start|>", "<|im_end|>"
_TURN = "{{{{ '{start}' + message['role'] + '\\n' + message['content'] + '{end}\\n' }}}}"
_TEMPLATE = (
    "{begin}{{% for message in messages %}}" + _TURN + "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{start}assistant\\n' }}}}{{% endif %}}"
)


def set_template(tokenizer: Any, source: str) -> None:
    """Gives the tokenizer the template that ``source`` names: ``chatml`` or ``path:FILE``.

    Raises:
        DataError: see ``template_text``.
    """
    if source != CHATML:
        tokenizer.chat_template = template_text(source)
        return
    if {_START, _END} <= control_tokens(tokenizer).ids.keys():
        tokenizer.eos_token = _END
    begin = "{{ bos_token }}" if front(tokenizer) else ""
    tokenizer.chat_template = _TEMPLATE.format(begin=begin, start=_START, end=tokenizer.eos_token)


def template_file(source: str) -> Path | None:
    """The file that ``path:FILE`` names; None for ``chatml``."""
    return None if source == CHATML else Path(source.removeprefix("path:")).expanduser().absolute()


def template_text(source: str) -> str:
    """The text of the template file, or ``chatml``. Two sources with the same text give the same rows.

    Raises:
        DataError: the source has another form, or its file is missing, not UTF-8, too large or not a regular file.
    """
    file = template_file(source)
    if file is None:
        return CHATML
    try:
        if source.startswith("path:"):
            return small_text(file)
        reason = f"{source!r} is not a valid template"
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{file} cannot be read: {error}"
    except DataError as error:
        reason = f"{file} cannot be read: it {error.message}"
    raise DataError(reason, where="model.chat_template", remedy=f"write {CHATML}, or path:FILE of a Jinja template")
