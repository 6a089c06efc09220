"""Chat templates that replace the tokenizer's own: ChatML, the user's, or one that TRL ships; and their options. ChatML
is for base models. If the vocabulary has ChatML's control tokens, they are used, and the one that ends a turn becomes
EOS. Otherwise a turn opens with the same words as ordinary text and ends with the tokenizer's EOS. No token is new, so
no embedding has to be trained, and an adapter is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.config.faults import as_path
from alignment.config.model import TemplateChoice
from alignment.core.errors import DataError
from alignment.core.files import small_text
from alignment.data.templates import TRL, trl_file, with_options
from alignment.data.tokens.rendering import control_tokens
from alignment.data.tokens.tokenize import front

CHATML = "chatml"
PATH = "path:"
_START, _END = "<|im_start|>", "<|im_end|>"
_TURN = "{{{{ '{start}' + message['role'] + '\\n' + message['content'] + '{end}\\n' }}}}"
_TEMPLATE = (
    "{begin}{{% for message in messages %}}" + _TURN + "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{start}assistant\\n' }}}}{{% endif %}}"
)
_FORMS = f"write {CHATML}, or {PATH}FILE of a Jinja template, or {TRL}NAME of one that TRL ships"


def set_template(tokenizer: Any, choice: TemplateChoice) -> None:
    """Gives the tokenizer the template that ``choice`` names, or keeps its own, with the options. Raises DataError: see
    ``template_text`` and ``with_options``; or options are given and there is no template."""
    if choice.source == CHATML:
        if {_START, _END} <= control_tokens(tokenizer).ids.keys():
            tokenizer.eos_token = _END
        begin = "{{ bos_token }}" if front(tokenizer) else ""
        tokenizer.chat_template = _TEMPLATE.format(begin=begin, start=_START, end=tokenizer.eos_token)
    elif choice.source is not None:
        tokenizer.chat_template = template_text(choice.source)
    if not choice.options:
        return
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template, so there are no template options",
            where="model.template_options",
            remedy="use a chat model, or set model.chat_template",
        )
    tokenizer.chat_template = with_options(tokenizer.chat_template, choice.options)


def template_file(source: str) -> Path | None:
    """The user's file that ``path:FILE`` names; None for a template that comes with a package."""
    return Path(source.removeprefix(PATH)).expanduser().absolute() if source.startswith(PATH) else None


def template_text(source: str) -> str:
    """The text of the template, or ``chatml``. Two sources with the same text give the same rows. Raises DataError: the
    source has another form, or its file is missing, not UTF-8, too large or not a regular file."""
    if source == CHATML:
        return CHATML
    if source.startswith(TRL):
        return _text_of(trl_file(source.removeprefix(TRL)))
    file = template_file(source)
    if file is None:
        raise DataError(
            f"{source!r} is not a valid template", where="model.chat_template", remedy=as_path(source) or _FORMS
        )
    return _text_of(file)


def _text_of(file: Path) -> str:
    try:
        return small_text(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{file} cannot be read: {error}"
    except DataError as error:
        reason = f"{file} cannot be read: it {error.message}"
    raise DataError(reason, where="model.chat_template", remedy=_FORMS)
