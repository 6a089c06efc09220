"""What a GGUF file says of a tokenizer, and a Modelfile of the prompts that the model was trained on, or is refused."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from alignment.commands.export.gguf_form.gguf_file import pre_tokenizer, vocabulary
from alignment.commands.export.gguf_form.modelfile import Inexpressible, chat_parts, modelfile, ollama_template
from alignment.core.errors import ModelError
from alignment.data.tokens.rendering import render
from alignment.data.tokens.tokenize import end_ids
from alignment.data.turns import Message
from tests.templates import CHATML, styled_tokenizer
from tests.tiny import pythia_tokenizer, tiny_tokenizer

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
PARAMETER stop "</s>"
PARAMETER num_ctx 4096
PARAMETER repeat_penalty 1
"""


def _turns(*turns: str) -> list[Message]:
    return [Message(role=role, content=content) for role, _, content in (turn.partition(": ") for turn in turns)]


CONVERSATIONS = [
    _turns("user: Hi."),
    _turns("system: Be brief.", "user: Hi."),
    _turns("user: {{ .Content }}", "assistant: {% x %}", "user: Why?\n\nSay it."),
    _turns("system: s", "user: a", "assistant: b", "user: c", "assistant: d", "user: e"),
]


def test_a_modelfile_has_the_models_template_and_stops() -> None:
    stops = ["<|im_end|>", "</s>"]
    text, notes = modelfile("model-f16.gguf", styled_tokenizer("smollm2"), stops=stops, context=4096, adds_bos=False)
    assert (text, notes) == (TINY, [])
    text, _ = modelfile("m.gguf", styled_tokenizer("chatml"), stops=stops, context=1 << 17, adds_bos=False)
    assert "PARAMETER num_ctx 8192\n" in text, "memory is not asked for a whole long context"
    text, notes = modelfile("m.gguf", pythia_tokenizer(), stops=["<|endoftext|>"], context=512, adds_bos=False)
    assert ('TEMPLATE """{{ .Prompt }}"""' in text, len(notes)) == (True, 1)


@pytest.mark.parametrize("style", ["llama3", "qwen", "smollm2"])
def test_the_template_writes_what_the_models_own_writes(style: str) -> None:
    """Without the BOS that llama.cpp adds, where the template writes one."""
    tokenizer = styled_tokenizer(style)
    for bos in ("", tokenizer.bos_token) if style != "qwen" else ("",):
        parts = chat_parts(tokenizer, bos=bos)
        for turns in CONVERSATIONS:
            assert bos + parts.rendered(turns) == render(tokenizer, turns, answering=True)


TOOLS = "tools work with llama-server, not with the Modelfile"
STRIPS = "the chat template strips whitespace around contents; Ollama does not"


@pytest.mark.parametrize(
    ("style", "notes"),
    [
        ("llama3", [STRIPS, TOOLS]),
        ("qwen", [TOOLS]),
        ("gemma", ["the chat template has no system turn, so Ollama ignores system messages", STRIPS]),
    ],
)
def test_what_a_template_leaves_out_is_a_note(style: str, notes: list[str]) -> None:
    tokenizer = styled_tokenizer(style)
    assert ollama_template(tokenizer, bos="")[1] == notes
    if style == "qwen":
        tokenizer.chat_template = {"default": CHATML, "tool_use": tokenizer.chat_template}
        assert ollama_template(tokenizer, bos="")[1] == notes


TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
FOR = "{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ loop.index ~ '<|im_end|>' + message.content }}{% endfor %}", "of user is"),
        ("{% for message in messages[-1:] %}" + TURN + END, "is left out"),
        (FOR + TURN + TURN + END, "repeated or moved"),
        # only the last question counts as one, so that earlier turns read otherwise
        (FOR + "{% if loop.index > 4 %}{{ '!' }}{% endif %}" + TURN + END, "of user, assistant, user, assistant, user"),
        # a word in a content changes what is written
        (FOR + "{% if '#' in message.content %}{{ '!' }}{% endif %}" + TURN + END, "a conversation of"),
        # the default system turn depends on the length of the conversation
        ("{% if messages | length == 3 %}{{ 'Three.' }}{% endif %}" + FOR + TURN + END, "of user, assistant, user is"),
    ],
)
def test_a_template_that_computes_is_refused(template: str, message: str) -> None:
    tokenizer = styled_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(Inexpressible, match=message):
        ollama_template(tokenizer, bos="")


def test_what_cannot_be_left_out_or_moved_is_refused() -> None:
    with pytest.raises(Inexpressible, match="a conversation of"):
        ollama_template(styled_tokenizer("chatml"), bos="<s>")
    # Mistral writes a system text inside the user's turn
    with pytest.raises(ModelError, match=r"a conversation of .*\n.*--no-modelfile"):
        modelfile("m.gguf", styled_tokenizer("mistral"), stops=["</s>"], context=512, adds_bos=True)


def test_a_later_system_turn_that_the_template_refuses_does_not_matter() -> None:
    tokenizer = styled_tokenizer("chatml")
    only_first = "{% if message.role == 'system' and not loop.first %}{{ raise_exception('only first') }}{% endif %}"
    tokenizer.chat_template = FOR + only_first + TURN + END
    assert chat_parts(tokenizer, bos="").turns["system"] == ("<|im_start|>system\n", "<|im_end|>\n")
    assert ollama_template(tokenizer, bos="")[1] == []


STRANGE = ['"""', "{{x}}", "}}", "{", "\u00a0", "\t", "\r", "a\\b", "\U0001f642", "\U000e0001", "'"]
"""Texts that a Modelfile or Go's template language might read otherwise than as they are."""


def test_strange_texts_are_quoted() -> None:
    """As strings that Go and Python read alike."""
    tokenizer = styled_tokenizer("chatml")
    turn = "'<|im_start|>' + message.role + message.content + '<|im_end|>'"
    for strange in (*STRANGE, " ".join(STRANGE)):
        tokenizer.chat_template = (
            f"{{% for message in messages %}}{{{{ {strange!r} + {turn} }}}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {strange!r} + '<|im_start|>assistant' }}}}{{% endif %}}"
        )
        template, _ = ollama_template(tokenizer, bos="")
        read = re.sub(r"\{\{ (\".*?\") \}\}", lambda quoted: ast.literal_eval(quoted[1]), template)
        assert read.count(f"{strange}<|im_start|>") == 4, "before each role, and before an answer"
        assert '"""' not in template
        assert all(letter.isprintable() or letter == "\n" for letter in template)
        assert not re.search('[{}"]', re.sub(r"\{\{ .*? \}\}", "", template))


_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
"""As the tokenizer.json of these families have them."""


def _bytes(*, use_regex: bool = True, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _split(rule: str, behavior: str = "isolated", *, use_regex: bool = False, invert: bool = False) -> Any:
    cut = pre_tokenizers.Split(Regex(rule), behavior, invert=invert)
    return pre_tokenizers.Sequence([cut, _bytes(use_regex=use_regex)])


def _digits(*, individual: bool) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=individual), _bytes()])


def _with(rule: Any, **changes: Any) -> PreTrainedTokenizerFast:
    """A tiny tokenizer that cuts by ``rule``; ``changes`` are of its tokenizer.json."""
    bpe = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    bpe.pre_tokenizer = rule
    described = json.loads(bpe.to_str())
    described["model"] |= changes
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (_bytes(), "gpt-2"),
        (_digits(individual=True), "smollm"),
        (_split(LLAMA3), "llama-bpe"),
        (_split(QWEN2), "qwen2"),
        (_bytes(add_prefix_space=True), None),
        (_digits(individual=False), None),
        (_split(LLAMA3.replace("{1,3}", "{1,2}")), None),
        (_split(QWEN2, invert=True), None),
        (None, None),
    ],
)
def test_a_rule_has_llama_cpps_name_or_is_refused(step: Any, name: str | None) -> None:
    described: dict[str, Any] = {"pre_tokenizer": None}
    if step is not None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = step
        described = json.loads(bpe.to_str())
    if name is not None:
        assert pre_tokenizer(described) == name
    else:
        with pytest.raises(ModelError, match=r"splits texts by .*: gpt-2, smollm, llama-bpe, qwen2"):
            pre_tokenizer(described)


def _spaces_stripped(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<x>", rstrip=True)])


def _lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("rule", "changes", "change", "message"),
    [
        (_bytes(), {"byte_fallback": True}, None, "byte_fallback is True"),
        (_bytes(), {"ignore_merges": True}, None, "ignore_merges is True with gpt-2"),
        (_split(LLAMA3), {}, None, "ignore_merges is False with llama-bpe"),
        (_bytes(), {}, _spaces_stripped, "the token '<x>' has rstrip"),
        (_bytes(), {}, _lower_case, "it normalises texts by .*Lowercase"),
    ],
)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(
    rule: Any, changes: dict[str, Any], change: Any, message: str
) -> None:
    tokenizer = _with(rule, **changes)
    if change is not None:
        change(tokenizer)
    with pytest.raises(ModelError, match=message):
        vocabulary(tokenizer, 400, [2])


def test_a_tokenizer_of_words_and_two_tokens_in_front_of_texts_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer, words.decoder = _bytes(), decoders.ByteLevel()
    with pytest.raises(ModelError, match="it is WordLevel"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b"), 2, [1])
    tokenizer = styled_tokenizer("chatml")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|endoftext|> $A", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    with pytest.raises(ModelError, match=r"puts \['<\|im_start\|>', '<\|endoftext\|>'\] in front of texts"):
        vocabulary(tokenizer, len(tokenizer), [2])


def test_rules_that_llama_cpp_has_are_written() -> None:
    """Llama 3's takes whole words before merges; a normal form is left to whoever sends texts."""
    words = vocabulary(_with(_split(LLAMA3), ignore_merges=True), 400, [2])
    assert (words.metadata["tokenizer.ggml.pre"], words.notes) == ("llama-bpe", [])
    tokenizer = _with(_split(QWEN2))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    (note,) = vocabulary(tokenizer, 400, [2]).notes
    assert "NFC" in note


def test_named_templates_are_written_as_llama_cpp_reads_them() -> None:
    tokenizer = tiny_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": "{{ tools }}" + template, "rag": template}
    metadata = vocabulary(tokenizer, 400, [2]).metadata
    assert metadata["tokenizer.chat_template"] == template
    assert metadata["tokenizer.chat_templates"] == ["tool_use", "rag"]
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}" + template


def test_more_tokens_than_embeddings_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    for size, stops, token in ((300, [2], len(tokenizer) - 1), (400, [2, 9999], 9999)):
        with pytest.raises(ModelError, match=f"has the token {token}, and the model has {size} rows"):
            vocabulary(tokenizer, size, stops)


def test_types_tell_control_tokens_from_words_and_from_empty_rows() -> None:
    tokenizer = styled_tokenizer("qwen")
    words = vocabulary(tokenizer, len(tokenizer) + 2, [2])
    tokens, types = words.metadata["tokenizer.ggml.tokens"], words.metadata["tokenizer.ggml.token_type"]
    of = dict(zip(tokens, types, strict=True))
    assert [of[token] for token in ("<|im_start|>", "<tool_call>", "a", "Ġthe")] == [3, 4, 1, 1]
    assert types[-2:] == [5, 5]
    assert len(set(tokens)) == len(tokens)


def _ids(words: Any) -> dict[str, int]:
    start, end = "tokenizer.ggml.", "_token_id"
    return {name[len(start) : -len(end)]: value for name, value in words.metadata.items() if name.endswith(end)}


def test_all_tokens_that_end_an_answer_are_written() -> None:
    """EOS, another token that ends the turn, and one that generation_config.json names; a fourth has no field."""
    tokenizer = styled_tokenizer("gemma")
    turn_end, eos = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    assert sorted(end_ids(tokenizer)) == [eos, turn_end]
    words = vocabulary(tokenizer, len(tokenizer), sorted({eos, turn_end, 0}))
    ids = _ids(words)
    assert (ids["eos"], ids["eot"], ids["eom"]) == (eos, turn_end, 0)
    assert (words.stops, words.notes) == (["<pad>", "<eos>", "<end_of_turn>"], [])
    words = vocabulary(tokenizer, len(tokenizer), sorted({eos, turn_end, 0, 3}))
    assert [note.rpartition("stop at ")[2] for note in words.notes] == ["<unk> too"]
    assert "<unk>" in words.stops


@pytest.mark.parametrize(
    ("style", "template", "adds_bos"),
    [
        ("llama3", "llama3", True),
        ("llama3", "chatml", False),  # chats were trained without it
        ("gemma", "gemma", True),
        ("chatml", "chatml", False),
        ("smollm2", "smollm2", False),
    ],
)
def test_bos_is_added_where_tokenizer_and_template_write_it(style: str, template: str, adds_bos: bool) -> None:
    tokenizer = styled_tokenizer(style)
    if template != style:
        tokenizer.chat_template = styled_tokenizer(template).chat_template.replace("<|im_end|>", "<|eot_id|>")
    words = vocabulary(tokenizer, len(tokenizer), sorted(end_ids(tokenizer)))
    assert words.adds_bos is words.metadata["tokenizer.ggml.add_bos_token"] is adds_bos
    assert words.metadata["tokenizer.ggml.add_eos_token"] is False
    bare = vocabulary(pythia_tokenizer(), len(pythia_tokenizer()), [0])
    assert (_ids(bare), bare.adds_bos) == ({"bos": 0, "eos": 0, "unknown": 0}, False)
    assert "tokenizer.chat_template" not in bare.metadata
