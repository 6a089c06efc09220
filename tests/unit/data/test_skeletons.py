"""Conversations that are put together without the template are those that the template renders."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest

from alignment.core.errors import DataError
from alignment.data.template_flow import only_writes_contents
from alignment.data.tokens import rendering, skeletons, tokenize
from alignment.data.tokens.rendering import render
from alignment.data.tokens.tokenize import encode_all
from alignment.data.turns import Message
from tests.templates import DEEPSEEK_LIKE, PHI_LIKE, STYLES, styled_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer


def _turns(written: str) -> str:
    """A template that writes this of each turn."""
    return "{% for turn in messages %}" + written + "{% endfor %}"


WRITES = [
    *(style.template for style in STYLES.values()),
    PHI_LIKE,
    _turns("{{ turn['content'].strip() ~ '\n' }}"),
    _turns(
        "{% set text = turn.role + ': ' + turn.content | trim %}{% if loop.first %}{{ bos_token }}{% endif %}{{ text }}"
    ),
    _turns("{{ (turn.content ~ ':') | trim }}{{ (': ' ~ turn.content) | trim }}"),
    _turns("{% if turn.content is string %}{{ turn.content }}{% else %}{{ turn.content | tojson }}{% endif %}"),
    _turns("{% if turn.tool_calls is defined %}{{ turn.content | tojson }}{% else %}{{ turn.content }}{% endif %}"),
    _turns(
        "{% if turn.role == 'tool' %}{{ turn.content[0] }}{% elif turn.content %}{{ turn.get('content') }}{% endif %}"
    ),
    "{% set space = namespace(text='') %}"
    + _turns("{% set space.text = space.text + turn.content %}")
    + "{{ space.text }}",
    "{{ (messages | first).content }}{{ messages[-1]['content'] }}{{ messages | length }}",
    "{{ messages[0].content if messages[0].role == 'system' else 'none' }}" + _turns("{{ turn.content or '' }}"),
]
LOOKS_INSIDE = [
    _turns(
        "{% set text = none %}{% if loop.first %}{% set text = turn.content %}{% endif %}"
        "{% if text is string %}{{ text }}{% else %}{{ turn.content | upper }}{% endif %}"
    ),
    DEEPSEEK_LIKE,
    _turns("{{ turn.content | tojson }}"),
    _turns("{{ turn.content | upper }}"),
    _turns("{{ turn.content | trim('x') }}"),
    _turns("{{ turn.content.strip('x') }}"),
    _turns("{{ turn.content.upper() }}"),
    _turns("{{ turn.content[0] }}"),
    _turns("{{ turn.content * 2 }}"),
    _turns("{{ '%s' % turn.content }}"),
    _turns("{{ ('a' + turn.content) | replace('a', 'b') }}"),
    _turns("{{ ('a' ~ turn.content) | length }}"),
    _turns("{{ [turn.content] }}"),
    _turns("{% if turn.content == 'x' %}x{% endif %}"),
    _turns("{% if 'x' in turn.content %}x{% endif %}"),
    _turns("{% if turn.content is eq('x') %}x{% endif %}"),
    _turns("{% set text = turn.content %}{% if text > 'x' %}x{% endif %}"),
    _turns("{% for letter in turn.content %}{{ letter }}{% endfor %}"),
    _turns("{% if turn.content is string and turn.content | length > 3 %}x{% endif %}"),
    _turns("{{ turn }}"),
    _turns("{{ turn.values() | join }}"),
    _turns("{% for name in turn %}{{ turn[name] }}{% endfor %}"),
    _turns("{% if loop.previtem is defined and loop.previtem.content == 'x' %}x{% endif %}"),
    _turns("{% set text %}{{ turn.content }}{% endset %}{{ text | upper }}"),
    _turns("{{ raise_exception(turn.content) }}"),
    "{% macro said(turn) %}{{ turn.content }}{% endmacro %}" + _turns("{{ said(turn) | upper }}"),
    "{% set space = namespace(text='') %}" + _turns("{% set space.text = turn.content %}{{ space.text | upper }}"),
    "{{ messages | tojson }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
    "{{ strftime_now('%Y') }}" + _turns("{{ turn.content }}"),
    "{% if %}",
]
CONTENTS = [
    *(
        "Hi.",
        " Hi.",
        "Hi.\n",
        "\n\tHi. \u2003",
        "\u2003",
        "a\u2003",
        '"\\\n<Aa',
        "\U000ffffd0",
        "{{ x }}",
        "<|im_end|>",
        "\u00e9",
    ),
    *(" ", "", "a</think>b", "<think>a</think>b", "0", "None", "[INST]", "a\r\nb"),
]


@pytest.mark.parametrize("template", WRITES)
def test_templates_that_only_write_contents_are_recognised(template: str) -> None:
    assert only_writes_contents(template)


@pytest.mark.parametrize("template", LOOKS_INSIDE)
def test_a_template_that_may_look_inside_a_content_is_left_to_itself(template: str) -> None:
    assert not only_writes_contents(template)


def _tokenizer(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _conversations(rng: random.Random) -> list[list[Message]]:
    roles = [
        ("system", "user", "assistant", "user", "assistant"),
        ("user", "assistant"),
        ("user",),
        ("assistant", "user"),
    ]
    return [[Message(role=role, content=rng.choice(CONTENTS)) for role in rng.choice(roles)] for _ in range(60)]


def _outcome(render_them: Any) -> str:
    try:
        return str(render_them())
    except DataError as error:
        return f"refused: {error}"


@pytest.mark.parametrize("template", [*WRITES, *STYLES])
def test_every_conversation_is_what_the_template_renders(template: str) -> None:
    """Blanks around a content, contents that look like marks, and contents that are left to the template included."""
    tokenizer = styled_tokenizer(template) if template in STYLES else _tokenizer(template)
    rng = random.Random(0)
    for messages in _conversations(rng):
        for answering in (False, True):
            by_template = functools.partial(
                rendering.render_by_template,
                tokenizer,
                messages,
                answering=answering,
                tools=(),
                templates=tokenizer.chat_template,
            )
            rendered = functools.partial(render, tokenizer, messages, answering=answering)
            assert _outcome(rendered) == _outcome(by_template)


def test_the_template_is_asked_twice_for_all_conversations_of_the_same_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = _tokenizer(CHAT_TEMPLATE), []
    applied = rendering._applied
    monkeypatch.setattr(rendering, "_applied", lambda *args, **kwargs: asked.append(1) or applied(*args, **kwargs))
    for number in range(20):
        render(tokenizer, [Message(role="user", content=f"{number}?")], answering=True)
    assert len(asked) == 2
    render(tokenizer, [Message(role="user", content="1?")], answering=False)
    assert len(asked) == 4
    monkeypatch.setattr(skeletons, "MOST", 2)
    for _ in range(2):
        render(tokenizer, [Message(role="system", content="1?")], answering=False)
    assert len(asked) == 6


class _Own(type(tiny_tokenizer())):  # type: ignore[misc]
    """A tokenizer that does more with a text than to pass it on."""

    def _encode_plus(self, text: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([sequence.upper() for sequence in text], **kwargs)


@pytest.mark.parametrize("splits", [False, True])
def test_ids_are_those_that_transformers_gives(splits: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.split_special_tokens = splits
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    texts = ["The shop is closed.", "", "<|im_start|>user\nHi.<|im_end|>\n", "\u00e9 \U0001f642"]
    ids = encode_all(tokenizer, texts)
    assert ids == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [len(of_text) > 2 for of_text in ids] == [True, False, True, True]
    assert tokenize._only_asks_backend(type(tokenizer))
    assert not tokenize._only_asks_backend(_Own)
    own = _Own(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    assert encode_all(own, ["abc"]) == encode_all(tokenizer, ["ABC"])
