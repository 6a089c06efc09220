"""A Modelfile writes the prompts that the model was trained on, or is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from alignment.commands.export.gguf_form.chat_parts import Inexpressible, chat_parts
from alignment.commands.export.gguf_form.go_template import evaluated
from alignment.commands.export.gguf_form.modelfile import modelfile, ollama_template
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import render
from alignment.data.turns import Message
from tests.templates import CHATML, styled_tokenizer
from tests.tiny import pythia_tokenizer

TINY = """\
# ollama create NAME -f Modelfile
FROM ./model-f16.gguf
TEMPLATE \"\"\"{{ range $index, $message := .Messages }}{{ if eq $index 0 }}{{ if ne .Role "system" }}<|im_start|>system
You are tiny.<|im_end|>
{{ end }}{{ end }}{{ if eq .Role "system" }}<|im_start|>system
{{ .Content }}<|im_end|>
{{ else if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
\"\"\"
PARAMETER stop "<|im_end|>"
PARAMETER num_ctx 4096
PARAMETER repeat_penalty 1
"""


def _turns(*turns: str) -> list[Message]:
    """``user: Hi.`` and so on."""
    return [Message(role=role, content=content) for role, _, content in (turn.partition(": ") for turn in turns)]


def test_a_modelfile_has_the_models_template_and_stops() -> None:
    text, notes = modelfile(
        "model-f16.gguf", styled_tokenizer("smollm2"), stops=["<|im_end|>"], context=4096, adds_bos=False
    )
    assert text == TINY
    assert notes == []


def test_memory_is_not_asked_for_a_whole_long_context() -> None:
    options: dict[str, Any] = {"stops": ["a", "b"], "context": 1 << 17, "adds_bos": False}
    text, _ = modelfile("m.gguf", styled_tokenizer("chatml"), **options)
    assert "PARAMETER num_ctx 8192\n" in text
    assert 'PARAMETER stop "a"\nPARAMETER stop "b"\n' in text


def test_a_model_without_a_chat_template_gets_plain_prompts() -> None:
    text, notes = modelfile("m.gguf", pythia_tokenizer(), stops=["<|endoftext|>"], context=512, adds_bos=False)
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert notes == ["the model has no chat template, so Ollama sends it plain prompts"]


CONVERSATIONS = [
    _turns("user: Hi."),
    _turns("system: Be brief.", "user: Hi."),
    _turns("user: {{ .Content }}", "assistant: {% x %}", "user: Why?\n\nSay it."),
    _turns("system: s", "user: a", "assistant: b", "user: c", "assistant: d", "user: e"),
]


@pytest.mark.parametrize("style", ["llama3", "qwen", "chatml", "smollm2"])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_template_writes_what_the_models_own_writes(style: str, turns: list[Message]) -> None:
    tokenizer = styled_tokenizer(style)
    template, _ = ollama_template(tokenizer, bos="")
    assert evaluated(template, turns) == render(tokenizer, turns, answering=True)


def test_a_default_system_turn_is_written_only_without_one() -> None:
    template, _ = ollama_template(styled_tokenizer("smollm2"), bos="")
    default = "<|im_start|>system\nYou are tiny.<|im_end|>\n"
    assert evaluated(template, _turns("user: a")).startswith(default)
    assert "You are tiny" not in evaluated(template, _turns("system: b", "user: a"))


@pytest.mark.parametrize("style", ["llama3", "smollm2"])
def test_bos_that_llama_cpp_adds_is_left_out(style: str) -> None:
    tokenizer = styled_tokenizer(style)
    template, _ = ollama_template(tokenizer, bos=tokenizer.bos_token)
    for turns in CONVERSATIONS:
        assert tokenizer.bos_token + evaluated(template, turns) == render(tokenizer, turns, answering=True)


def test_bos_that_the_template_does_not_write_cannot_be_left_out() -> None:
    with pytest.raises(Inexpressible, match="at the beginning"):
        ollama_template(styled_tokenizer("chatml"), bos="<s>")


@pytest.mark.parametrize(
    ("style", "notes"),
    [
        (
            "llama3",
            [
                "the chat template strips whitespace around contents; Ollama does not",
                "tools work with llama-server, not with the Modelfile",
            ],
        ),
        ("qwen", ["tools work with llama-server, not with the Modelfile"]),
        (
            "gemma",
            [
                "the chat template has no system turn, so Ollama ignores system messages",
                "the chat template strips whitespace around contents; Ollama does not",
            ],
        ),
    ],
)
def test_what_a_template_leaves_out_is_a_note(style: str, notes: list[str]) -> None:
    tokenizer = styled_tokenizer(style)
    assert ollama_template(tokenizer, bos="")[1] == notes


def test_a_template_of_several_that_reads_tools_is_a_note() -> None:
    tokenizer = styled_tokenizer("qwen")
    tokenizer.chat_template = {"default": CHATML, "tool_use": tokenizer.chat_template}
    assert ollama_template(tokenizer, bos="")[1] == ["tools work with llama-server, not with the Modelfile"]


TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
FOR = "{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ loop.index ~ '<|im_end|>' + message.content }}{% endfor %}", "writes"),
        ("{% for message in messages[-1:] %}" + TURN + END, "is left out"),
        (
            FOR + TURN + TURN + END,
            "repeated or moved",
        ),
        # only the last question counts as one, so that earlier turns read otherwise
        (
            FOR + "{% if loop.index > 4 %}{{ '!' }}{% endif %}" + TURN + END,
            "a conversation of user, assistant, user, assistant, user is",
        ),
        # a word in a content changes what is written
        (
            FOR + "{% if '#' in message.content %}{{ '!' }}{% endif %}" + TURN + END,
            "a conversation of",
        ),
        # the default system turn depends on the length of the conversation
        (
            "{% if messages | length == 3 %}{{ 'Three.' }}{% endif %}" + FOR + TURN + END,
            "a conversation of user, assistant, user is",
        ),
    ],
)
def test_a_template_that_computes_is_refused(template: str, message: str) -> None:
    tokenizer = styled_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(Inexpressible, match=message):
        ollama_template(tokenizer, bos="")


def test_a_system_text_inside_the_users_turn_is_refused() -> None:
    """Mistral's way."""
    with pytest.raises(ModelError, match=r"written for Ollama: between a system turn and .*\n.*--no-modelfile"):
        modelfile("m.gguf", styled_tokenizer("mistral"), stops=["</s>"], context=512, adds_bos=True)


def test_a_later_system_turn_that_the_template_refuses_does_not_matter() -> None:
    tokenizer = styled_tokenizer("chatml")
    tokenizer.chat_template = (
        FOR + "{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('only first') }}{% endif %}" + TURN + END
    )
    parts = chat_parts(tokenizer)
    assert parts.turns["system"] == ("<|im_start|>system\n", "<|im_end|>\n")
    template, _ = ollama_template(tokenizer, bos="")
    for turns in CONVERSATIONS:
        assert evaluated(template, turns) == render(tokenizer, turns, answering=True)


STRANGE = ['"""', "{{x}}", "}}", "{", "\u00a0", "\t", "\r", "a\\b", "\U0001f642", "\U000e0001", "'"]
"""Texts that a Modelfile or Go's template language might read otherwise than as they are."""


@pytest.mark.parametrize("strange", [*STRANGE, " ".join(STRANGE)])
def test_strange_texts_are_quoted(strange: str) -> None:
    tokenizer = styled_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ STRANGE + '<|im_start|>' + message.role + message.content + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ STRANGE + '<|im_start|>assistant' }}{% endif %}"
    ).replace("STRANGE", repr(strange))
    template, _ = ollama_template(tokenizer, bos="")
    turns = _turns("system: s", "user: u")
    assert evaluated(template, turns) == render(tokenizer, turns, answering=True)
    assert evaluated(template, turns).count(strange) == 3
    assert '"""' not in template
    assert all(letter.isprintable() or letter == "\n" for letter in template)
    outside = re.sub(r"\{\{ .*? \}\}", "", template)
    assert not re.search('[{}"]', outside)


@pytest.mark.parametrize(
    "template",
    [
        "{{ range $index, $message := .Messages }}{{ .Content | trim }}{{ end }}",
        "{{ range $index, $message := .Messages }}{{ if .Tools }}x{{ end }}{{ end }}",
        "{{ range $index, $message := .Messages }}{{ .Content }}",
        "{{- range .Messages }}{{ .Content }}{{ end }}",
        "{{ range $index, $message := .Messages }}{{ .Content }}{{ end }}{{ .System }}",
        "{{ .System }}{{ range $index, $message := .Messages }}{{ .Content }}{{ end }}",
        "{{range $index, $message := .Messages}}{{.Content}}{{end}}",
    ],
)
def test_the_evaluator_refuses_what_it_does_not_know(template: str) -> None:
    with pytest.raises(ValueError, match=r"known|no end|in front|not in list"):
        evaluated(template, _turns("user: a"))
