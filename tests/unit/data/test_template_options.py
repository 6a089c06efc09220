"""Options of a chat template reach whatever renders it, and one that the template never reads is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.commands.shared.loaded_policies import parts_of
from alignment.config.model import TemplateChoice
from alignment.core.errors import DataError
from alignment.data.chat_template import set_template, template_text
from alignment.data.template_options import own_template, value_faults, with_options
from alignment.data.template_syntax import fields_of, options_of
from alignment.data.tokens.rendering import prompt_text
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.data.trl_templates import trained_as, trl_templates
from alignment.data.turns import Message
from tests.real_templates import GPT_OSS, QWEN, dressed, text_of
from tests.tiny import save_tiny_model, tiny_tokenizer

HI = [Message(role="user", content="Hi.")]
ECHO = "{{ messages[0].content }}|{{ mood }}"


def _echoed(value: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ECHO
    set_template(tokenizer, TemplateChoice(options={"mood": value}))
    return prompt_text(tokenizer, HI)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (False, "False"),
        (3, "3"),
        (-1.5e-07, "-1.5e-07"),
        ("high", "high"),
        ('"a\\n" %}{{ b }}', '"a\\n" %}{{ b }}'),
        ("two\nlines\r\n", "two\nlines\r\n"),
        ("é ☕ 🙂", "é ☕ 🙂"),
        (["browser", "python"], "['browser', 'python']"),
        ([], "[]"),
    ],
)
def test_a_template_gets_the_value_of_an_option(value: Any, text: str) -> None:
    assert _echoed(value) == f"Hi.|{text}"


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  ", "{% if true %}\n  {% endif %}\n", "  {%- set a = 1 %}\n"])
def test_the_line_that_sets_an_option_leaves_no_trace_in_the_text(start: str) -> None:
    before, after = tiny_tokenizer(), tiny_tokenizer()
    before.chat_template = after.chat_template = start + ECHO
    set_template(after, TemplateChoice(options={"mood": "calm"}))
    assert prompt_text(after, HI) == prompt_text(before, HI) + "calm"


OPTIONS = {
    "qwen3": {"enable_thinking": False},
    "qwen3_5_nothink": {"enable_thinking": True},
    "qwen3_6": {"preserve_thinking": True, "enable_thinking": False},
    "qwen3_8": {"reasoning_effort": "low"},
    "gptoss": {"reasoning_effort": "high", "model_identity": "You are tiny.", "builtin_tools": ["python"]},
    "nemotron_3_nano": {"enable_thinking": False, "truncate_history_thinking": False},
    "nemotron_3_super": {"low_effort": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_does_when_a_caller_passes_it(name: str) -> None:
    """The oracle is the call of transformers with the option as an argument. Other values of a caller still win."""
    options, family = OPTIONS[name], GPT_OSS if name == "gptoss" else QWEN
    template = text_of(name)
    assert template is not None
    bare, ours = dressed(family, template), dressed(family, template, options)
    turns = [
        *HI,
        Message(role="assistant", content="Hello.", thought="Hm." if family is QWEN else ""),
        *HI,
    ]
    plain = [turn.as_dict() for turn in turns]
    passed = bare.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options)
    assert prompt_text(ours, turns) == passed
    assert prompt_text(bare, turns) != passed
    option = next(iter(options))
    other = {"reasoning_effort": "medium"}.get(option, not options[option])
    assert ours.apply_chat_template(plain, tokenize=False, **{**options, option: other}) == bare.apply_chat_template(
        plain, tokenize=False, **{**options, option: other}
    )


def test_the_option_that_was_given_last_counts() -> None:
    again = with_options(with_options(ECHO, {"mood": "old"}), {"mood": "new"})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = again
    assert prompt_text(tokenizer, HI) == "Hi.|new"


def test_every_template_of_a_tokenizer_gets_the_options() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": ECHO, "tool_use": "tools: " + ECHO}
    set_template(tokenizer, TemplateChoice(options={"mood": "calm"}))
    assert prompt_text(tokenizer, HI) == "Hi.|calm"


# ---- which options a template reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"enable_thinking"}),
        ("qwen3_6", {"enable_thinking", "preserve_thinking", "add_vision_id"}),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
        ("nemotron_3_nano", {"enable_thinking", "truncate_history_thinking"}),
        ("qwen3_training", {"enable_thinking"}),
        ("phi3", set()),
        ("deepseekv3", set()),
    ],
)
def test_the_options_of_a_template_are_the_names_that_it_reads(name: str, options: set[str]) -> None:
    template = text_of(name)
    assert template is not None
    assert options_of(template) == options


def test_a_name_that_a_template_sets_before_it_reads_it_is_no_option() -> None:
    assert options_of("{% set mood = 1 %}{{ mood }}{% for turn in messages %}{{ turn }}{% endfor %}") == set()
    assert options_of("{% set mood = mood if mood is defined else 1 %}{{ mood }}") == {"mood"}
    assert options_of("{% generation %}{{ mood }}{% endgeneration %}{{ strftime_now('%Y') }}") == {"mood"}


def test_the_fields_of_a_template_are_those_of_messages_and_no_variables() -> None:
    assert {"thinking", "reasoning_content", "</think>"} & fields_of(
        "{% if thinking %}{% for m in messages %}{{ m.reasoning_content }}{% endfor %}{% endif %}"
    ) == {"reasoning_content"}
    assert "thinking" in fields_of("{{ 'thinking' in m }}")
    assert "thinking" in fields_of("{{ m['thinking'] }}")
    assert "</think>" in fields_of("{% if '</think>' in content %}{% endif %}")
    assert "</think>" not in fields_of("{{ '</think>' + content }}")


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        (
            {"enable_thinkin": False},
            "enable_thinkin",
            r"has no option of this name; did you mean 'enable_thinking'\?",
        ),
        ({"mood": 1}, "mood", "has no option of this name; one of: enable_thinking"),
        ({"messages": 1}, "messages", "has no option of this name"),
        (
            {"enable_thinking": None},
            "enable_thinking",
            r"None is not allowed; .*~model\.template_options\.enable_thinking",
        ),
        (
            {"enable_thinking": {"a": 1}},
            "enable_thinking",
            "give true or false, a number, a text, or a list of these",
        ),
        ({"enable_thinking": [[1]]}, "enable_thinking", "give true or false, a number"),
    ],
)
def test_what_cannot_be_an_option_is_refused(options: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        dressed(QWEN, text_of("qwen3") or "", options)
    assert caught.value.where == f"model.template_options.{where}"


def test_an_infinite_number_is_no_value() -> None:
    assert [fault.where for fault in value_faults({"mood": float("inf")})] == ["model.template_options.mood"]


def test_a_template_that_is_no_jinja_is_refused_where_options_are_sought() -> None:
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        dressed(QWEN, "\n{% if %}", {"mood": 1})


def test_options_without_a_template_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template, so there are no template options"):
        set_template(tokenizer, TemplateChoice(options={"mood": 1}))


# ---- where options go -----------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(text_of("qwen3") or "")
    return folder


def test_a_saved_tokenizer_has_the_options_and_so_has_what_loads_it(base: Path, tmp_path: Path) -> None:
    choice = TemplateChoice(options={"enable_thinking": False})
    tokenizer = load_tokenizer(base, choice)
    assert prompt_text(tokenizer, HI).endswith("<think>\n\n</think>\n\n")
    tokenizer.save_pretrained(str(tmp_path / "artifact"))
    again = load_tokenizer(tmp_path / "artifact")
    assert prompt_text(again, HI) == prompt_text(tokenizer, HI)
    assert tokenizer_hashes(again) == tokenizer_hashes(tokenizer)
    assert tokenizer_hashes(again) != tokenizer_hashes(load_tokenizer(base))


def test_a_bare_base_of_a_run_has_its_options_too(base: Path) -> None:
    _, tokenizer = parts_of(None, base, TemplateChoice(options={"enable_thinking": False}))
    assert prompt_text(tokenizer, HI).endswith("<think>\n\n</think>\n\n")


def test_a_models_own_template_is_found_without_its_tokenizer(base: Path, tmp_path: Path) -> None:
    assert own_template(base) == text_of("qwen3")
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    for stored, template in [
        ("{{ a }}", "{{ a }}"),
        ([{"name": "default", "template": "b"}], {"default": "b"}),
        (None, None),
    ]:
        (base / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": stored}))
        assert own_template(base) == template
    assert own_template(tmp_path / "nowhere") is None


# ---- the templates of TRL -------------------------------------------------------------------------------------------


def test_trls_templates_are_read_where_trl_is_installed() -> None:
    assert template_text("trl:qwen3_training") == trl_templates()["qwen3_training"].read_text()
    with pytest.raises(DataError, match=r"ships no chat template 'qwen3_trainig'; did you mean trl:qwen3_training\?"):
        template_text("trl:qwen3_trainig")


def test_the_training_template_of_a_model_is_known_by_its_own_with_and_without_options() -> None:
    template, training = text_of("qwen3") or "", text_of("qwen3_training") or ""
    assert trained_as(template) == ("trl:qwen3_training", training)
    options = {"enable_thinking": False}
    with_option = (str(with_options(text, options)) for text in (template, training))
    assert trained_as(next(with_option)) == ("trl:qwen3_training", next(with_option))
    assert trained_as("{{ messages }}") is None
