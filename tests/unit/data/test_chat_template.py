"""ChatML for base models that have no template, with and without its control tokens; templates from files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from alignment.config.model import TemplateChoice
from alignment.core.errors import DataError
from alignment.data.chat_template import CHATML, set_template, template_text
from alignment.data.tokens.rendering import render
from alignment.data.tokens.tokenize import tokenize_conversation, turn_end_id
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.data.turns import Message
from tests.templates import styled_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TALK = [Message(role="user", content="Hi."), Message(role="assistant", content="Hello.")]


def _saved(folder: Path, tokenizer: Any) -> Path:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(folder))
    return folder


def _learned(tokenizer: Any) -> str:
    row = tokenize_conversation(tokenizer, TALK)
    return str(tokenizer.decode([label for label in row.labels if label != -100]))


def test_a_vocabulary_with_chatmls_tokens_uses_them(tmp_path: Path) -> None:
    bare = tiny_tokenizer()
    bare.eos_token = "<|endoftext|>"
    tokenizer = load_tokenizer(_saved(tmp_path, bare), TemplateChoice(source=CHATML))
    assert tokenizer.eos_token == "<|im_end|>"
    assert _learned(tokenizer) == "Hello.<|im_end|>"
    assert render(tokenizer, TALK[:1], answering=True) == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


def test_another_vocabulary_ends_turns_with_its_own_eos_and_gets_no_new_token(tmp_path: Path) -> None:
    bare = styled_tokenizer("gemma")
    size = len(bare)
    tokenizer = load_tokenizer(_saved(tmp_path, bare), TemplateChoice(source=CHATML))
    assert len(tokenizer) == size
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id
    assert _learned(tokenizer) == "Hello.<eos>"
    row = tokenize_conversation(tokenizer, TALK)
    assert tokenizer.decode(row.input_ids) == "<bos><|im_start|>user\nHi.<eos>\n<|im_start|>assistant\nHello.<eos>"
    assert row.input_ids.count(tokenizer.bos_token_id) == 1


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_saved(tmp_path / "base", styled_tokenizer("gemma")), TemplateChoice(source=CHATML))
    tokenizer.save_pretrained(str(tmp_path / "artifact"))
    again = load_tokenizer(tmp_path / "artifact")
    assert tokenizer_hashes(again) == tokenizer_hashes(tokenizer)
    assert _learned(again) == "Hello.<eos>"


def test_several_named_templates_are_saved_and_hashed(tmp_path: Path) -> None:
    """As Cohere's and Hermes' tokenizers have them: one for tools, and one for everything else."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer_hashes(tokenizer)
    assert plain["chat_template_sha256"] == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools | tojson }}" + CHAT_TEMPLATE}
    tokenizer.save_pretrained(str(tmp_path))
    again = load_tokenizer(tmp_path)
    hashes = tokenizer_hashes(again)
    assert hashes == tokenizer_hashes(tokenizer)
    assert hashes["chat_template_sha256"] != plain["chat_template_sha256"]
    again.chat_template = dict(reversed(again.chat_template.items()))
    assert tokenizer_hashes(again) == hashes
    tool = {"type": "function", "function": {"name": "add"}}
    assert render(again, TALK, answering=False) == render(tiny_tokenizer(), TALK, answering=False)
    assert render(again, TALK, answering=False, tools=[tool]).startswith('[{"type": "function"')


def test_a_default_template_without_others_is_hashed_like_its_text(tmp_path: Path) -> None:
    """A saved tokenizer has only the text."""
    tokenizer = tiny_tokenizer()
    plain = tokenizer_hashes(tokenizer)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE}
    assert tokenizer_hashes(tokenizer) == plain
    tokenizer.save_pretrained(str(tmp_path))
    assert tokenizer_hashes(load_tokenizer(tmp_path)) == plain
    tokenizer.chat_template = {"tool_use": CHAT_TEMPLATE}
    assert tokenizer_hashes(tokenizer) != plain


def test_a_template_of_the_users_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    tokenizer = tiny_tokenizer()
    set_template(tokenizer, TemplateChoice(source=f"path:{file}"))
    assert _learned(tokenizer) == "Hello.<|im_end|>"


@pytest.mark.parametrize("source", ["path:nowhere.jinja", "llama", "path:"])
def test_a_template_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(DataError) as caught:
        template_text(source)
    assert caught.value.where == "model.chat_template"
    assert "path:FILE" in str(caught.value)
