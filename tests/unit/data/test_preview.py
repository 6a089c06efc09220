"""What the preview shows is what the stages learn from."""

from __future__ import annotations

import errno
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.preview.worker import main, show_stage
from alignment.config.data import DataConfig, MixedConfig
from alignment.config.model import ModelConfig
from alignment.config.too_long import TooLong, TooLongConfig
from alignment.data.overlap import HeldOut, LocatedText
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, PROMPTS, Kind, tokenized
from alignment.data.tokens.token_spans import RecordSpans, histogram, record_spans
from alignment.data.turns import Message
from alignment.stages.cpt.config import CptConfig
from alignment.stages.dpo.config import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.reward.config import RewardConfig
from alignment.stages.sft.config import SftConfig
from tests.public import PUBLIC, WRITTEN, needs_public_data
from tests.real_templates import QWEN, dressed, text_of
from tests.templates import styled_tokenizer
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_spec, tiny_tokenizer

ASKED = (Message(role="user", content="Hi."),)
ROOT = Path(__file__).parents[3]
OPENED = "<|im_start|>system\nYou are tiny.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML turns."""
    return tiny_tokenizer()


def _shown(tokenizer: Any, kind: Kind, record: Any) -> RecordSpans:
    (tokenized_record,) = tokenized(tokenizer, kind, [record], Limits(row=100))
    return record_spans(tokenizer, tokenized_record)


def _learned_runs(spans: RecordSpans) -> dict[str, list[tuple[str, bool]]]:
    """Runs of learned and unlearned tokens as text, by sequence."""
    return {
        name: [
            ("".join(run.text for run in group), learned)
            for learned, group in itertools.groupby(runs, key=lambda run: run.learned)
        ]
        for name, runs in spans.sequences.items()
    }


def test_a_conversation_shows_which_tokens_are_learned(tokenizer: Any) -> None:
    record = Conversation(messages=(*ASKED, Message(role="assistant", content="Hello.")), where="x:1")
    spans = _shown(tokenizer, CONVERSATIONS, record)
    assert [run.text for run in spans.sequences[""] if run.control and run.learned] == ["<|im_end|>"]
    assert _learned_runs(spans) == {"": [(OPENED, False), ("Hello.<|im_end|>", True)]}
    assert spans.tokens > spans.learned > 0


def test_a_pair_shows_both_answers_and_a_prompt_none(tokenizer: Any) -> None:
    record = PreferencePair(messages=ASKED, chosen="Hello.", rejected="Go.", where="x:1")
    spans = _shown(tokenizer, PAIRS, record)
    assert _learned_runs(spans) == {
        "prompt": [(OPENED, False)],
        "chosen": [("Hello.<|im_end|>", True)],
        "rejected": [("Go.<|im_end|>", True)],
    }
    prompt = _shown(tokenizer, PROMPTS, Prompt(messages=ASKED, where="x:1"))
    assert _learned_runs(prompt) == {"prompt": [(OPENED, False)]}
    assert prompt.learned == 0
    assert spans.tokens == prompt.tokens + len(tokenizer("Hello.<|im_end|>")["input_ids"])


def test_what_two_answers_do_not_share_is_marked(tokenizer: Any) -> None:
    record = PreferencePair(messages=ASKED, chosen="We open at nine.", rejected="We open at six.", where="x:1")
    spans = _shown(tokenizer, PAIRS, record)
    for name, word in (("chosen", "nine"), ("rejected", "six")):
        marked = "".join(run.text for run in spans.sequences[name] if run.differs)
        assert marked.strip()
        assert marked.strip() in word
    assert not any(run.differs for run in spans.sequences["prompt"])


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
    assert "1 row faulty, such as " in printed
    assert "data.jsonl:2: 'completion' must be text and not empty; it is ''" in printed


def test_what_a_template_drops_and_changes_is_counted_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    asked = {"role": "user", "content": "2 + 2?"}
    rows = [
        {"messages": [asked, thought]},
        {"messages": [asked, {**thought, "reasoning_content": "Hm."}, asked, thought]},
    ]
    spec = {"model": ModelConfig(source=BASE_SOURCE, chat_template="trl:qwen3")}
    printed = _printed(tmp_path, SftConfig(max_length=200), rows, capsys, **spec)
    assert "1 record becomes several rows, because the chat template changes earlier turns, such as " in printed
    assert "1 record loses thoughts of earlier turns in the chat template, such as " in printed
    assert printed.count("data.jsonl:2") == 2
    assert "⟦<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>⟧" in printed
    unthinking = {"model": replace(spec["model"], template_options={"enable_thinking": False})}
    answers = [{"messages": [asked, {"role": "assistant", "content": "Four."}]}]
    printed = _printed(tmp_path, SftConfig(), [*answers, *rows], capsys, **unthinking)
    assert "\n</think>\n\n⟦Four.<|im_end|>⟧" in printed
    assert "2 rows faulty, such as " in printed
    assert "→ set model.template_options.enable_thinking=true" in printed


def test_the_sequences_of_a_conversation_are_shown_one_by_one() -> None:
    tokenizer = dressed(QWEN, text_of("qwen3") or "")
    turns = (*ASKED, Message(role="assistant", content="Hello."))
    spans = _shown(tokenizer, CONVERSATIONS, Conversation(messages=turns * 2, where="x:1"))
    opened, thought = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    assert _learned_runs(spans) == {
        "sequence 1": [(opened, False), (f"{thought}Hello.<|im_end|>", True)],
        "sequence 2": [(f"{opened}Hello.<|im_end|>\n{opened}", False), (f"{thought}Hello.<|im_end|>", True)],
    }


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


def test_odd_rows_are_counted_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "base")
    tiny_tokenizer().save_pretrained(str(tmp_path / "base"))
    asked = "When does the shop in the hall open and who has the keys of it?"
    rows = [(asked, "At nine."), ("Hi.", "The end: <|im_end|>"), ("Hi.", "The end: <|im_end|>")]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    held_out = HeldOut([LocatedText(where="heldout.jsonl:7", text=asked.upper())])
    show_stage(Console(width=300), tiny_spec(tmp_path, SftConfig(max_length=100)), rows=1, held_out=held_out)
    printed = capsys.readouterr().out
    assert f"1 record repeats an earlier one, such as {tmp_path}/data.jsonl:3" in printed
    assert "2 records have text that looks like a control token but is ordinary text, such as " in printed
    assert "1 record resembles a prompt of the evaluation, such as " in printed
    assert "which has 100% of heldout.jsonl:7" in printed


def test_a_row_that_is_cut_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SftConfig(max_length=40, too_long=TooLongConfig(do=TooLong.cut))
    printed = _printed(tmp_path, config, [{"prompt": "Why?" * 40, "completion": "So."}], capsys)
    assert "· cut: the row has " in printed
    assert "limit 40: 0 too long, 1 cut" in printed
    assert printed.count("system") == 0, "the beginning of the prompt is gone"


def test_what_would_stop_the_stage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Hi.", "completion": "Hello."}, {"prompt": "Why?" * 40, "completion": "So."}]
    printed = _printed(tmp_path, SftConfig(max_length=60), rows, capsys)
    assert "the stage would stop: 1 dropped of 2 rows because they are too long, more than 10%" in printed
    printed = _printed(tmp_path, SftConfig(), [rows[0], {"prompt": "Hi.", "completion": 5}], capsys)
    assert "the stage would stop: 'completion' must be text" in printed
    assert "would stop" not in _printed(tmp_path, SftConfig(), rows, capsys)


def test_what_would_stop_the_stage_is_not_known_from_the_first_records_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.commands.preview.worker.LOOKED_AT", 2)
    short, long = {"prompt": "Hi.", "completion": "Hello."}, {"prompt": "Why?" * 40, "completion": "So."}
    stops = "the stage would stop: 1 dropped of 2 rows because they are too long"
    printed = _printed(tmp_path, SftConfig(max_length=60), [short, long, *[short] * 20], capsys)
    assert f"\nif the other records are like the first 2, {stops}" in printed
    config = SftConfig(max_length=60, data=DataConfig(limit=2))
    assert f"\n{stops}" in _printed(tmp_path, config, [short, long, *[short] * 20], capsys), "it reads no others"


def test_what_is_taken_of_the_rows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Hi.", "completion": "Good."}\n')
    data = DataConfig(source="", fraction=0.5, mix=[MixedConfig(share=0.25)])
    rows = [{"prompt": f"{number}?", "completion": "Yes."} for number in range(6)]
    printed = _printed(tmp_path, SftConfig(data=data), rows, capsys, extra_data={"data.mix[0]": other})
    assert "data.fraction=0.5: about 3 of these are used" in printed
    assert "mixed in: 25% of all rows" in printed


def test_the_page_shows_what_the_terminal_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "base")
    tiny_tokenizer().save_pretrained(str(tmp_path / "base"))
    (tmp_path / "data.jsonl").write_text('{"prompt": "Hi.", "completion": "<b>Hello</b>."}\n')
    spec = tiny_spec(tmp_path, SftConfig(max_length=100))
    monkeypatch.setattr("alignment.commands.preview.worker.read_spec", lambda _: spec)
    assert main(["stage.yaml", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;Hello&lt;/b&gt;." in page
    report = (ROOT / "alignment/report/templates/macros.html.j2").read_text()
    (policy,) = [line for line in report.splitlines() if "Content-Security-Policy" in line]
    assert page.index("<head>") < page.index(policy) < page.index("<style>")
    assert "1 record, " in page
    assert "1 record, " in capsys.readouterr().out


def test_a_page_that_does_not_fit_on_the_disk_leaves_the_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    page.write_text("older")

    def write_text(_: Path, text: str, **options: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("alignment.commands.preview.worker.show_stage", lambda *_, **__: None)
    monkeypatch.setattr("alignment.commands.preview.worker.read_spec", lambda _: None)
    monkeypatch.setattr(Path, "write_text", write_text)
    assert main(["stage.yaml", "--html", str(page)]) == 12
    assert "no space left on the device" in capsys.readouterr().err
    assert page.read_text() == "older"
    assert list(tmp_path.iterdir()) == [page]


FILES = {
    "hh-rlhf/harmless_base.jsonl": DpoConfig,
    "oasst/pairs.jsonl": RewardConfig,
    "llamafactory-demo/alpaca_en_demo.json": SftConfig,
    "llamafactory-demo/dpo_en_demo.json": DpoConfig,
    "llamafactory-demo/kto_en_demo.json": SftConfig,
    "llamafactory-demo/glaive_toolcall_en_demo.json": SftConfig,
    "llamafactory-demo/identity.json": SftConfig,
    "llamafactory-demo/c4_demo.jsonl": CptConfig,
    "gsm8k/train.jsonl": SftConfig,
    "mt-bench/question.jsonl": PpoConfig,
    "torchtune-tiny/alpaca_tiny.json": SftConfig,
    "torchtune-tiny/chat_tiny.json": SftConfig,
    "torchtune-tiny/hh_rlhf_tiny.json": DpoConfig,
    "torchtune-tiny/stack_exchange_paired_tiny.json": RewardConfig,
}


OURS = {
    "transcripts.jsonl": RewardConfig,
    "pairs.jsonl": DpoConfig,
    "instructions.json": SftConfig,
    "system_pairs.json": DpoConfig,
    "labelled.json": SftConfig,
    "toolcalls.json": SftConfig,
    "identity.json": SftConfig,
    "texts.jsonl": CptConfig,
    "sums.jsonl": SftConfig,
    "questions.jsonl": PpoConfig,
    "chat.json": SftConfig,
    "whole_pairs.json": DpoConfig,
    "answers_by_rank.json": RewardConfig,
}
SHAPES = [
    *(pytest.param(WRITTEN / file, kind, id=f"ours: {file}") for file, kind in OURS.items()),
    *(pytest.param(PUBLIC / file, kind, id=file, marks=needs_public_data) for file, kind in FILES.items()),
]


@pytest.mark.parametrize(("file", "kind"), SHAPES)
def test_files_in_public_shapes_are_shown_as_they_are(
    file: Path, kind: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template that knows tools."""
    styled_tokenizer("qwen").save_pretrained(str(tmp_path / "base"))
    data = DataConfig(source="", limit=300, placeholders={"name": "Ada", "author": "Bob"})
    spec = tiny_spec(tmp_path, kind(data=data), data_path=file)
    show_stage(Console(width=200), spec, rows=2)
    printed = capsys.readouterr().out
    assert any(f"{noun}, " in printed for noun in ("record", "records"))
    assert "faulty" not in printed
    assert "{{" not in printed or file.name != "identity.json"
    if "toolcall" in file.name:
        assert "<tools>" in printed
