"""What the preview shows is what the stages learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.config.data import DataConfig, MixedConfig
from alignment.config.stage import DpoConfig, PpoConfig, SftConfig
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.turns import Message
from alignment.preview import histogram, show_stage, shown
from tests.tiny import save_tiny_model, tiny_spec, tiny_tokenizer

ASKED = (Message(role="user", content="Hi."),)
OPENED = "<|im_start|>system\nYou are tiny.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML turns."""
    return tiny_tokenizer()


def _told(sequences: Any) -> dict[str, list[tuple[str, bool]]]:
    return {name: [(piece.text, piece.learned) for piece in pieces] for name, pieces in sequences.items()}


def test_a_conversation_shows_which_tokens_are_learned(tokenizer: Any) -> None:
    one = shown(
        tokenizer,
        Conversation(messages=(*ASKED, Message(role="assistant", content="Hello.")), where="x:1"),
        max_length=100,
    )
    assert _told(one.sequences) == {"": [(OPENED, False), ("Hello.<|im_end|>", True)]}
    assert one.tokens > one.learned > 0


def test_a_pair_shows_both_answers_and_a_prompt_none(tokenizer: Any) -> None:
    one = shown(tokenizer, PreferencePair(messages=ASKED, chosen="Hello.", rejected="Go.", where="x:1"), max_length=100)
    assert _told(one.sequences) == {
        "prompt": [(OPENED, False)],
        "chosen": [("Hello.<|im_end|>", True)],
        "rejected": [("Go.<|im_end|>", True)],
    }
    prompt = shown(tokenizer, Prompt(messages=ASKED, where="x:1"), max_length=100)
    assert _told(prompt.sequences) == {"prompt": [(OPENED, False)]}
    assert prompt.learned == 0
    assert one.tokens == prompt.tokens + len(tokenizer("Hello.<|im_end|>")["input_ids"])


def test_bars_cover_all_lengths() -> None:
    lines = histogram([1, 2, 3, 79, 80])
    assert len(lines) == 8
    assert sum(int(line.split()[-1]) for line in lines) == 5
    assert lines[0].split() == ["1–10", "█" * 30, "3"]
    assert lines[-1].split() == ["71–80", "█" * 20, "2"]


def _printed(folder: Path, config: Any, rows: list[Any], capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    save_tiny_model(folder / "base")
    tiny_tokenizer().save_pretrained(str(folder / "base"))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_stage(Console(width=200), tiny_spec(folder, config, **more), rows=1)
    return capsys.readouterr().out


def test_a_stage_shows_rows_counts_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "Hi.", "completion": "Hello."},
        {"prompt": "Hi.", "completion": ""},
        {"prompt": "Why?" * 40, "completion": "So."},
    ]
    printed = _printed(tmp_path, SftConfig(max_length=100), rows, capsys)
    assert "format prompt_completion: " in printed
    assert printed.count("⟦") == 1, "one row was asked for"
    assert "⟦Hello.<|im_end|>⟧" in printed
    assert "2 records, " in printed
    assert "limit 100: 1 too long" in printed
    assert "1 rows faulty, such as " in printed
    assert "data.jsonl:2: 'completion' must be text and not empty; it is ''" in printed


def test_what_is_mixed_in_is_shown_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Hi.", "chosen": "Good.", "rejected": "Bad."}\n')
    config = DpoConfig(data=DataConfig(mix=[MixedConfig(count=1)]))
    pair = {"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go."}
    printed = _printed(tmp_path, config, [pair], capsys, extra_data={"data.mix[0]": other})
    for text in ("chosen: ⟦Hello.<|im_end|>⟧", "rejected: ⟦Go.<|im_end|>⟧", "chosen: ⟦Good.<|im_end|>⟧"):
        assert text in printed
    assert printed.count("learned; longest") == 2


def test_prompts_of_ppo_are_shown_ready_for_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(tmp_path, PpoConfig(), [{"prompt": "Hi."}], capsys)
    assert "prompt: <|im_start|>system" in printed
    assert "learned" not in printed
