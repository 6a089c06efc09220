"""Tokens of a user's own: they are one id each, change little, are learned, and survive stages and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.commands.add_tokens.worker import add_tokens, main
from alignment.commands.export.export_options import ExportOptions
from alignment.commands.export.worker import export
from alignment.config.adapter import AdapterConfig
from alignment.config.model import NEW_TOKENS
from alignment.core.errors import ConfigError
from alignment.data.records import Conversation, PlainText
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import CONVERSATIONS, TEXTS, tokenized
from alignment.data.turns import Message
from tests.chained import Chained
from tests.oracles.close import close
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

TOKENS = ["<|think|>", "<|/think|>"]
TEXT = "The shop <|think|>is closed<|/think|> on Monday."
IDS = torch.tensor([[5, 6, 7, 8, 2]])


def untied(folder: Path) -> Path:
    """Embeddings and head apart, and more rows than the tokenizer has tokens."""
    tokenizer = tiny_tokenizer()
    tiny_model("qwen2", vocab_size=len(tokenizer) + 8).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("make", [save_tiny_model, untied], ids=["tied", "untied, spare rows"])
def test_a_new_token_is_one_id_and_old_ones_keep_their_logits(tmp_path: Path, make: object) -> None:
    base = make(tmp_path / "base")  # type: ignore[operator]
    before = len(tiny_tokenizer())
    add_tokens(base, tmp_path / "more", TOKENS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == [before, before + 1]
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
    assert TOKENS[0] not in tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True)
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "more"))
    with torch.no_grad():
        logits, expected = new(IDS).logits, old(IDS).logits
    close(logits[..., :before], expected[..., :before])
    close(logits[..., before], expected[..., :before].mean(-1), atol=1e-5)
    close(new.get_input_embeddings().weight[before], old.get_input_embeddings().weight[:before].mean(0), atol=1e-6)
    assert new.get_input_embeddings().weight.shape[0] >= before + 2
    assert json.loads((tmp_path / "more" / NEW_TOKENS).read_text()) == TOKENS, "for who trains them"
    add_tokens(tmp_path / "more", tmp_path / "most", ["<|last|>"])
    assert json.loads((tmp_path / "most" / NEW_TOKENS).read_text()) == [*TOKENS, "<|last|>"]


@pytest.mark.parametrize("in_text", [False, True])
def test_the_text_of_rows_has_new_tokens_only_if_they_are_added_for_it(tmp_path: Path, in_text: bool) -> None:
    """Control tokens stay text in a message, so that nobody can write the template's."""
    options = ["--in-text"] if in_text else []
    base = save_tiny_model(tmp_path / "base")
    assert main([str(base), "--to", str(tmp_path / "more"), *options, "--", *TOKENS]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "more")
    new = tokenizer.convert_tokens_to_ids(TOKENS)
    for text in (TEXT, f"{TEXT} The tag <|im_end|> is text."):
        turns = (Message(role="user", content="Hi"), Message(role="assistant", content=text))
        (conversation,) = tokenized(tokenizer, CONVERSATIONS, [Conversation(messages=turns)], Limits(row=1_000))
        (plain,) = tokenized(tokenizer, TEXTS, [PlainText(text=text)], Limits(row=1_000))
        for record in (conversation, plain):
            (row,) = record.rows
            learned = [number for number in row["labels"] if number >= 0]
            assert [number for number in learned if number in new] == (new if in_text else [])
            assert text in tokenizer.decode(learned)


def test_they_survive_training_by_adapter_and_export(tmp_path: Path) -> None:
    chained = Chained(tmp_path)
    base = tmp_path / "more"
    add_tokens(chained.base, base, TOKENS)
    adapter = AdapterConfig(rank=4, modules_to_save=["embed_tokens"])
    changes = {"base_path": base, "identity": {"kind": "sft", "base": {"dtype": "float32"}}}
    chained.run("sft", adapter, **changes)
    artifact = chained.inputs["sft"].path
    assert artifact is not None
    tokenizer = AutoTokenizer.from_pretrained(artifact / "tokenizer")
    (token,) = tokenizer(TOKENS[0], add_special_tokens=False)["input_ids"]
    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(next(artifact.glob("adapters/*")))
    )
    export(artifact, base, tmp_path / "out", ExportOptions(form="model", max_gap=0.01))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TOKENS[0], add_special_tokens=False)["input_ids"] == [token]
    asked = torch.tensor([[5, token, 7, 2]])
    with torch.no_grad():
        close(plain(asked).logits, trained(asked).logits, atol=1e-4)
        started = AutoModelForCausalLM.from_pretrained(base)(asked).logits
        assert float((plain(asked).logits - started).abs().max()) > 1e-2
    chained.run("dpo", AdapterConfig(rank=4), init="sft", **changes)
    later = chained.inputs["dpo"].path
    assert later is not None
    assert AutoTokenizer.from_pretrained(later / "tokenizer").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("tokens", "why"),
    [
        (["<|im_end|>"], "'<|im_end|>' is already a token"),
        (["<|a|>", "<|a|>"], "'<|a|>' is given twice"),
        ([" "], "' ' is empty"),
    ],
)
def test_a_token_that_cannot_be_new_is_refused_and_nothing_written(
    tmp_path: Path, tokens: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_model(tmp_path / "base")
    with pytest.raises(ConfigError) as caught:
        add_tokens(base, tmp_path / "more", tokens)
    assert why in str(caught.value)
    assert main([str(base), "--to", str(tmp_path / "more"), "--", *tokens]) == 2
    assert why in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
