"""llama.cpp reads exported files as transformers reads the policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.exported import exported_result, logprobs
from alignment.commands.export.gguf_form import gguf_file
from alignment.commands.export.gguf_form.gguf_file import file_metadata, model_metadata, vocabulary, write_file
from alignment.commands.export.gguf_form.llama_cpp_check import ask, check_by_llama
from alignment.commands.export.worker import export
from alignment.core.artifacts import verify
from alignment.core.errors import ModelError
from alignment.data.tokens.tokenize import prompt_ids
from alignment.data.turns import Message
from alignment.models.forward.generate import generate
from tests.chained import FULL, LORA, tiny_base, trained_policy
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.engines

QUESTIONS = ("Hi.", "Say it in one sentence.", "1, 2, 3,", "Grüße?", "The shop is closed on Monday 14 October.")


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (LORA, {}),
        (FULL, {"head_dim": 16, "tie_word_embeddings": False}),
        (LORA, {"num_key_value_heads": 1}),
        (FULL, {"architecture": "qwen2"}),
        (LORA, {"architecture": "qwen3"}),
    ],
)
def test_greedy_answers_are_equal(
    tmp_path: Path, llama_python: Path, adapter: Any, changes: dict[str, Any], dtype: str
) -> None:
    base = tiny_base(tmp_path, **changes)
    model, saved = trained_policy(tmp_path, base, adapter)
    options = ExportOptions(form="gguf", dtype=dtype, llama_python=str(llama_python))
    printed = export(saved.path, base.base, tmp_path / "out", options)
    assert "tokenizes the test texts in the same way" in printed
    prompts = [prompt_ids(tiny_tokenizer(), [Message(role="user", content=text)]) for text in QUESTIONS]
    expected = generate(_merged(model), prompts, max_new_tokens=16, end_ids=[2], batch_size=8)
    file = tmp_path / "out" / f"model-{dtype}.gguf"
    reply = ask(llama_python, file, prompts=prompts, max_new_tokens=16, stops=[2])
    narrow = [
        (own, answer, min(gap for _, gap in margins))
        for own, answer, margins in zip(expected, reply["answers"], reply["margins"], strict=True)
        if own != answer
    ]
    assert not narrow if dtype == "f32" else all(gap < 0.05 for *_, gap in narrow)


def test_rows_in_transformers_order_are_refused(
    tmp_path: Path, llama_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault behind much gibberish: Q and K for another rotation. llama.cpp loads such a file without a word."""
    base = tiny_base(tmp_path)
    model, saved = trained_policy(tmp_path, base, FULL)
    result = exported_result(saved.path, verify(saved.path, content=True), base.base)
    words = vocabulary(result.tokenizer, model.config.vocab_size, result.stops)
    metadata = {**model_metadata(model.config), **file_metadata("f32"), **words.metadata}
    monkeypatch.setattr(gguf_file, "interleaved", lambda weight, heads: weight)
    write_file(tmp_path / "wrong.gguf", model, metadata, "f32")
    with pytest.raises(ModelError, match="likeliest at only"):
        check_by_llama(
            llama_python, tmp_path / "wrong.gguf", result, logprobs(model, result.rows), adds_bos=False, max_gap=0.01
        )


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
    ],
)
def test_texts_are_cut_into_the_same_tokens(tmp_path: Path, llama_python: Path, rule: Any, name: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = rule
    base = tiny_base(tmp_path, tokenizer=tokenizer)
    _, saved = trained_policy(tmp_path, base)
    export(saved.path, base.base, tmp_path / "out", ExportOptions(form="gguf", dtype="f32"))
    texts = [
        "In 1958 there were 12,345.67 of them; that's 3x more, isn't it?",
        "  two  blanks\n\n\nand lines \t tabs\r\n",
        "Grüße an 東京 🙂 αβγ",
        "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n",
    ]
    reply = ask(llama_python, tmp_path / "out" / "model-f32.gguf", texts=texts)
    assert reply["ids"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], name
    assert reply["ends"] == [0, 2]
