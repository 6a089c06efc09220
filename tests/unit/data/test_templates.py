"""Chat templates: where they come from, their options, and answers of thinking models learned exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from alignment.commands.shared.loaded_policies import parts_of
from alignment.config.model import TemplateChoice
from alignment.core.errors import DataError
from alignment.data.chat_template import CHATML, set_template, template_text
from alignment.data.records import Conversation
from alignment.data.templates import options_of, trl_templates, with_options
from alignment.data.tokens.rendering import prompt_text, render
from alignment.data.tokens.row_kinds import CONVERSATIONS, Limits, Tokenized, tokenized
from alignment.data.tokens.tokenize import IGNORED, prompt_ids, tokenize_conversation, turn_end_id
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.data.turns import Message
from tests.field.models import save_model
from tests.real_templates import ARGUMENTS, CASES, DEEPSEEK, GPT_OSS, NAME, PHI_4, QWEN, Case, dressed, text_of
from tests.templates import DEEPSEEK_LIKE, PHI_LIKE, styled_tokenizer
from tests.tiny import save_tiny_model, tiny_tokenizer

HI = [Message(role="user", content="Hi.")]
TALK = [*HI, Message(role="assistant", content="Hello.")]
ECHO = "{{ messages[0].content }}|{{ mood }}"
CALM = TemplateChoice(options={"mood": "calm"})


def _with(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _saved(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(str(folder))
    return folder


def _learned(tokenizer: Any) -> str:
    row = tokenize_conversation(tokenizer, TALK)
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize(("style", "end", "bos"), [("smollm2", "<|im_end|>", ""), ("gemma", "<eos>", "<bos>")])
def test_chatml_for_a_base_model_ends_turns_with_its_control_token_or_with_eos(
    tmp_path: Path, style: str, end: str, bos: str
) -> None:
    """A vocabulary without ChatML's tokens gets no new ones."""
    bare = styled_tokenizer(style)
    bare.chat_template, size = None, len(bare)
    bare.eos_token = "<|endoftext|>" if style == "smollm2" else bare.eos_token
    tokenizer = load_tokenizer(_saved(tmp_path / "base", bare), TemplateChoice(source=CHATML))
    assert (len(tokenizer), tokenizer.eos_token) == (size, end)
    assert turn_end_id(tokenizer) == tokenizer.eos_token_id
    text = f"{bos}<|im_start|>user\nHi.{end}\n<|im_start|>assistant\n"
    assert render(tokenizer, HI, answering=True) == text
    assert tokenizer.decode(tokenize_conversation(tokenizer, TALK).input_ids) == f"{text}Hello.{end}"
    again = load_tokenizer(_saved(tmp_path / "artifact", tokenizer))
    assert tokenizer_hashes(again) == tokenizer_hashes(tokenizer)
    assert _learned(again) == f"Hello.{end}"


def test_a_template_is_read_from_a_file_of_the_users_or_of_trl(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    tokenizer = tiny_tokenizer()
    set_template(tokenizer, TemplateChoice(source=f"path:{file}"))
    assert _learned(tokenizer) == "Hello.<|im_end|>"
    assert template_text("trl:qwen3_training") == trl_templates()["qwen3_training"].read_text()


@pytest.mark.parametrize(
    ("source", "words"),
    [("path:nowhere.jinja", "path:FILE"), ("trl:qwen3_trainig", "did you mean trl:qwen3_training?")],
)
def test_a_template_that_is_none_is_refused(source: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        template_text(source)
    assert caught.value.where == "model.chat_template"
    assert words in str(caught.value)


def test_a_template_gets_the_ids_of_calls_and_what_their_results_answer() -> None:
    """As Mistral's, this one refuses calls and results without an id of nine letters."""
    tokenizer = _with(
        "{% for turn in messages %}"
        "{% for id in ([turn.tool_call_id] if turn.role == 'tool' else turn.tool_calls | map(attribute='id')) %}"
        "{% if id|length != 9 %}{{ raise_exception('an id has nine letters') }}{% endif %}{% endfor %}"
        "<|im_start|>{{ turn.role }} {{ turn.tool_call_id }} {{ turn.name }}: {{ turn.content }}"
        "{% for call in turn.tool_calls %}{{ call.id }} {{ call.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant  : {% endif %}"
    )
    call = {"id": "abc123xyz", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [
        *HI,
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="4", call_id="abc123xyz", name="add"),
        Message(role="tool", content="5", call_id="123456789", name="sum"),
        Message(role="assistant", content="4."),
    ]
    text = tokenizer.decode(tokenize_conversation(tokenizer, turns).input_ids)
    assert 'abc123xyz {"name": "add", "arguments": {"a": 2}}<|im_end|><|im_start|>tool abc123xyz add: 4<' in text
    assert "<|im_start|>tool 123456789 sum: 5<" in text
    with pytest.raises(DataError, match="an id has nine letters"):
        tokenize_conversation(tokenizer, [*turns[:2], Message(role="tool", content="4"), turns[-1]])


OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": {"enable_thinking": False},
    "gptoss": {"reasoning_effort": "high", "model_identity": "You are tiny.", "builtin_tools": ["python"]},
    "nemotron_3_nano": {"enable_thinking": False, "truncate_history_thinking": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_does_when_a_caller_passes_it(name: str) -> None:
    """The oracle is the call of transformers with the option as an argument. Other values of a caller still win."""
    options, family = OPTIONS[name], GPT_OSS if name == "gptoss" else QWEN
    template = text_of(name)
    assert template is not None
    bare, ours = dressed(family, template), dressed(family, template, options)
    turns = [*HI, Message(role="assistant", content="Hello.", thought="Hm." if family is QWEN else ""), *HI]
    plain = [turn.as_dict() for turn in turns]
    passed = bare.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options)
    assert prompt_text(ours, turns) == passed != prompt_text(bare, turns)
    option = next(iter(options))
    others = options | {option: {"reasoning_effort": "medium"}.get(option, not options[option])}
    by_caller = (tokenizer.apply_chat_template(plain, tokenize=False, **others) for tokenizer in (ours, bare))
    assert next(by_caller) == next(by_caller)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", {"enable_thinking"}),
        ("gptoss", {"builtin_tools", "model_identity", "reasoning_effort"}),
        ("{% set mood = 1 %}{{ mood }}{% for turn in messages %}{{ turn }}{% endfor %}", set()),
        ("{% set mood = mood if mood is defined else 1 %}{{ mood }}", {"mood"}),
        ("{% generation %}{{ mood }}{% endgeneration %}{{ strftime_now('%Y') }}", {"mood"}),
    ],
)
def test_the_options_of_a_template_are_the_names_that_it_reads_before_it_sets_them(
    name: str, options: set[str]
) -> None:
    assert options_of(text_of(name) or name) == options


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"enable_thinkin": False}, ".enable_thinkin", "did you mean 'enable_thinking'?"),
        ({"mood": 1}, ".mood", "one of: enable_thinking"),
        ({"messages": 1}, ".messages", "no option"),
        ({"enable_thinking": None}, ".enable_thinking", "~model.template_options.enable_thinking"),
        ({"enable_thinking": {"a": 1}}, ".enable_thinking", "true or false, a number, a text, or a list"),
    ],
)
def test_what_cannot_be_an_option_is_refused(options: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        dressed(QWEN, text_of("qwen3") or "", options)
    assert caught.value.where == f"model.template_options{where}"
    assert words in str(caught.value)


def test_a_saved_tokenizer_and_a_bare_base_of_a_run_have_the_options(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tiny_model(base)
    (base / "chat_template.jinja").write_text(text_of("qwen3") or "")
    choice = TemplateChoice(options={"enable_thinking": False})
    tokenizer = load_tokenizer(base, choice)
    again = load_tokenizer(_saved(tmp_path / "artifact", tokenizer))
    for made in (tokenizer, again, parts_of(None, base, choice)[1]):
        assert prompt_text(made, HI).endswith("<think>\n\n</think>\n\n")
    assert tokenizer_hashes(again) == tokenizer_hashes(tokenizer) != tokenizer_hashes(load_tokenizer(base))
    after_a_whole_stage = load_tokenizer(tmp_path / "artifact", choice)
    assert tokenizer_hashes(after_a_whole_stage) == tokenizer_hashes(tokenizer)


def test_a_pad_token_that_the_model_does_not_have_is_replaced_by_eos(tmp_path: Path) -> None:
    """The class of Qwen2's tokenizer adds <|endoftext|> to a vocabulary without it."""
    save_model(tmp_path, "qwen2", biased=True, template="gemma")
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == 1 + AutoConfig.from_pretrained(tmp_path).vocab_size, "it should have added a token"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"vocab_size": len(tokenizer)}}))
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>", "the language model has it"


def test_the_last_option_counts_in_every_template_of_a_tokenizer() -> None:
    again = with_options(with_options(ECHO, {"mood": "old"}), {"mood": "new"})
    assert prompt_text(_with(again), HI) == "Hi.|new"
    tokenizer = _with({"default": ECHO, "tool_use": "{{ tools[0].function.name }}: " + ECHO})
    set_template(tokenizer, CALM)
    assert prompt_text(tokenizer, HI) == "Hi.|calm"
    assert render(tokenizer, HI, answering=True, tools=[{"function": {"name": "add"}}]) == "add: Hi.|calm"


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
LIMITS = Limits(row=100_000)


def _user(text: str) -> Message:
    return Message(role="user", content=text)


def _answer(text: str, thought: str = "", **more: Any) -> Message:
    return Message(role="assistant", content=text, thought=thought, **more)


def _talk(asked: str, answer: str, thought: str = "") -> list[Message]:
    return [_user(asked), _answer(answer, thought)]


CALL = {"type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": NAME, "description": "Adds.", "parameters": {"type": "object"}}}
SYSTEM = Message(role="system", content="Be brief.")
PLAIN = [
    turn for pair in (("Open?", "From nine."), ("Thanks", "Bye."), ("Still there?", "Yes.")) for turn in _talk(*pair)
]
THOUGHTFUL = [*_talk("2 + 2?", "Four.", "Two and two."), *_talk("Sure?", "Quite.", "I count\n\nagain.")]
CALLING = [
    _user("2 + 2?"),
    _answer("", "I need the tool.", tool_calls=(CALL,)),
    Message(role="tool", content="4"),
    _answer("It is four.", "The tool says so."),
]


def _real(name: str, family: Any = QWEN, options: Any = None) -> Any:
    template = text_of(name)
    assert template is not None, "TRL ships it"
    return dressed(family, template, options)


def _tokenizer(case: Case) -> Any:
    return _real(case.name, case.family, case.options)


def _tokenized(tokenizer: Any, messages: list[Message], tools: tuple[Any, ...] = ()) -> Tokenized:
    record = Conversation(messages=tuple(messages), tools=tools, where="x:1")
    (row,) = tokenized(tokenizer, CONVERSATIONS, [record], LIMITS)
    if row.fault is not None:
        raise row.fault
    return row


def _runs(row: Any) -> list[tuple[list[int], list[int]]]:
    runs, end = [], 0
    for learned, run in groupby(row["labels"], key=lambda label: label != IGNORED):
        start, end = end, end + len(list(run))
        runs += [(row["input_ids"][:start], row["input_ids"][start:end])] if learned else []
    return runs


def _check(case: Case, messages: list[Message], tools: tuple[Any, ...] = ()) -> Tokenized:
    tokenizer = _tokenizer(case)
    whole = _tokenized(tokenizer, messages, tools)
    runs = [run for row in whole.rows for run in _runs(row)]
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    assert [tokenizer.decode(learned) for _, learned in runs] == [case.learned(messages[index]) for index in answers]
    for index, (read, _) in zip(answers, runs, strict=True):
        assert tokenizer.decode(read) == tokenizer.decode(prompt_ids(tokenizer, messages[:index], tools))
    return whole


@every_case
@pytest.mark.parametrize("system", [False, True], ids=["no system turn", "a system turn"])
def test_answers_without_thoughts_are_learned_exactly(case: Case, system: bool) -> None:
    messages = [SYSTEM, *PLAIN] if system else PLAIN
    if case.without_thought:
        whole = _check(case, messages)
        assert len(whole.rows) == (1 if case.keeps else 3)
        assert whole.lost == frozenset()
    else:
        with pytest.raises(DataError, match="renders a prompt differently when an answer follows it"):
            _tokenized(_tokenizer(case), messages)


@every_case
def test_answers_with_thoughts_are_learned_exactly_in_a_field_or_between_tags(case: Case) -> None:
    if not case.with_thought:
        return
    whole = _check(case, THOUGHTFUL)
    assert len(whole.rows) == (1 if case.keeps else 2)
    tagged = [
        replace(turn, thought="", content=f"<think>\n{turn.thought}\n</think>\n\n{turn.content}")
        if turn.thought
        else turn
        for turn in THOUGHTFUL
    ]
    assert _tokenized(_tokenizer(case), tagged).rows == whole.rows


@every_case
def test_calls_are_learned_exactly_and_results_are_read(case: Case) -> None:
    if not case.calls:
        return
    messages = CALLING if case.with_thought else [replace(message, thought="") for message in CALLING]
    whole = _check(case, messages, (TOOL,))
    assert "4" in _tokenizer(case).decode(whole.rows[-1]["input_ids"])


def test_an_answer_behind_calls_is_learned_behind_the_thoughts_that_led_to_them() -> None:
    """gpt-oss drops them once the answer follows, but a model reads them when it answers."""
    tokenizer = _real("gptoss", GPT_OSS)
    read, learned = _runs(_tokenized(tokenizer, CALLING, (TOOL,)).rows[-1])[-1]
    assert "analysis<|message|>I need the tool.<|end|>" in tokenizer.decode(read)
    assert tokenizer.decode(learned).startswith("<|channel|>analysis<|message|>The tool says so.<|end|>")


JSON_AND_TRIMMED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>"
    "{{ message.content | trim if message.role == 'user' else message.content | tojson }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
ODD = _talk("  Say:\n\n  “a” \n", 'He said: "yes".\nThen <|im_end|> he left.')
OTHER_CALL = {"type": "function", "function": {"name": NAME, "arguments": {"b": "eleven", "c": [True, None, 7]}}}
TWO_CALLS = [_user("2 + 2?"), _answer("", tool_calls=(CALL, OTHER_CALL))]


@pytest.mark.parametrize(
    ("name", "family", "messages", "lost"),
    [
        ("qwen3", QWEN, THOUGHTFUL, {"thoughts of earlier turns"}),
        ("qwen3", QWEN, THOUGHTFUL[:2], set()),
        ("qwen3_training", QWEN, THOUGHTFUL, set()),
        (DEEPSEEK_LIKE, DEEPSEEK, THOUGHTFUL[:2], {"thoughts of answers that are learned"}),
        (PHI_LIKE, PHI_4, [SYSTEM, *PLAIN[:2]], {"system turns"}),
        (PHI_LIKE, PHI_4, PLAIN, set()),
        (JSON_AND_TRIMMED, PHI_4, ODD, set()),
        ("gptoss", GPT_OSS, TWO_CALLS, {"calls of tools"}),
    ],
)
def test_what_a_template_drops_is_named(name: str, family: Any, messages: list[Message], lost: set[str]) -> None:
    """What is trimmed or written as JSON is not lost."""
    tokenizer = dressed(family, text_of(name) or name)
    assert _tokenized(tokenizer, messages).lost == lost


def _learned_alone(tokenizer: Any, messages: list[Message]) -> str:
    ((_, learned),) = (run for row in _tokenized(tokenizer, messages).rows for run in _runs(row))
    return str(tokenizer.decode(learned))


@pytest.mark.parametrize(
    ("name", "family", "options", "messages", "remedy"),
    [
        ("nemotron_3_nano", QWEN, {}, PLAIN, "set model.template_options.enable_thinking=false"),
        # TRL's would have the same option
        ("qwen3", QWEN, {"enable_thinking": False}, THOUGHTFUL, "set model.template_options.enable_thinking=true"),
        ("deepseek_r1_distill", DEEPSEEK, {}, THOUGHTFUL, "set model.chat_template=trl:deepseek_r1_distill_training"),
        # TRL's own for it drops thoughts too
        ("deepseekv3", DEEPSEEK, {}, THOUGHTFUL, "set model.chat_template=chatml"),
    ],
)
def test_an_answer_that_contradicts_its_prompt_names_what_helps(
    name: str, family: Any, options: Any, messages: list[Message], remedy: str
) -> None:
    with pytest.raises(DataError, match="renders a prompt differently when an answer follows it") as caught:
        _tokenized(_real(name, family, options), messages)
    assert caught.value.remedy.startswith(remedy)
    assert "the prompt ends with" in caught.value.message


@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_5_think", "qwen3_8_training"])
def test_a_generated_answer_without_its_opening_tag_is_read_as_thought_and_answer(name: str) -> None:
    """The prompt ends with the tag, so a model does not write it."""
    tokenizer = _real(name)
    written = [_user("2 + 2?"), _answer("Two and two.\n</think>\n\nFour."), _user("Sure?")]
    in_a_field = [written[0], _answer("Four.", "Two and two."), written[2]]
    assert prompt_ids(tokenizer, written) == prompt_ids(tokenizer, in_a_field)


def test_a_template_that_takes_arguments_only_as_text_gets_them_as_json() -> None:
    tokenizer = dressed(DEEPSEEK, DEEPSEEK_LIKE)
    call = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 2}'
    learned = _learned_alone(tokenizer, [_user("2 + 2?"), _answer("", tool_calls=(CALL,))])
    assert learned == f"{call}<｜end▁of▁sentence｜>"
    refuses = dressed(PHI_4, "{{ messages[0].content + 1 }}")
    with pytest.raises(DataError, match="refuses these messages: can only concatenate str"):
        _tokenized(refuses, [_user("Hi."), _answer("", tool_calls=(CALL,))])


def test_an_answer_that_is_only_context_may_contradict_its_prompt() -> None:
    tokenizer = _real("nemotron_3_nano")
    turns = [_user("Hi."), _answer("Hello.", learned=False), *THOUGHTFUL[:2]]
    ((read, learned),) = _runs(_tokenized(tokenizer, turns).rows[0])
    assert tokenizer.decode(learned) == "Two and two.\n</think>\nFour.<|im_end|>"
    assert "Hello." in tokenizer.decode(read)
