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
from tests.hub import PUBLIC, WRITTEN, needs_public_data
from tests.real_templates import QWEN, dressed, text_of
from tests.templates import styled_tokenizer
from tests.tiny import BASE_SOURCE, save_tiny_model, tiny_spec, tiny_tokenizer

ASKED = (Message(role="user", content="Hi."),)
ROOT = Path(__file__).parents[3]
OPENED = "<|im_start|>system\nYou are tiny.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
SHORT = {"prompt": "Hi.", "completion": "Hello."}
LONG = {"prompt": "Why?" * 40, "completion": "So."}
PAIR = {"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go."}

# ---- token spans ----------------------------------------------------------------------------------------------------


def _spans(tokenizer: Any, kind: Kind, record: Any) -> RecordSpans:
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


def test_a_record_shows_which_tokens_of_its_sequences_are_learned() -> None:
    tokenizer = tiny_tokenizer()
    answered = Conversation(messages=(*ASKED, Message(role="assistant", content="Hello.")), where="x:1")
    conversation = _spans(tokenizer, CONVERSATIONS, answered)
    assert [run.text for run in conversation.sequences[""] if run.control and run.learned] == ["<|im_end|>"]
    assert _learned_runs(conversation) == {"": [(OPENED, False), ("Hello.<|im_end|>", True)]}
    pair = _spans(tokenizer, PAIRS, PreferencePair(messages=ASKED, chosen="Hello.", rejected="Go.", where="x:1"))
    assert _learned_runs(pair) == {
        "prompt": [(OPENED, False)],
        "chosen": [("Hello.<|im_end|>", True)],
        "rejected": [("Go.<|im_end|>", True)],
    }
    prompt = _spans(tokenizer, PROMPTS, Prompt(messages=ASKED, where="x:1"))
    assert _learned_runs(prompt) == {"prompt": [(OPENED, False)]}
    answer = len(tokenizer("Hello.<|im_end|>")["input_ids"])
    assert (prompt.learned, conversation.learned) == (0, answer)
    assert pair.tokens == conversation.tokens == prompt.tokens + answer


def test_what_two_answers_do_not_share_is_marked() -> None:
    record = PreferencePair(messages=ASKED, chosen="We open at nine.", rejected="We open at six.", where="x:1")
    spans = _spans(tiny_tokenizer(), PAIRS, record)
    marked = {name: "".join(run.text for run in runs if run.differs) for name, runs in spans.sequences.items()}
    assert marked["prompt"] == ""
    for name, word in (("chosen", "nine"), ("rejected", "six")):
        assert marked[name].strip()
        assert marked[name].strip() in word


def test_the_sequences_of_a_conversation_are_shown_one_by_one() -> None:
    tokenizer = dressed(QWEN, text_of("qwen3") or "")
    turns = (*ASKED, Message(role="assistant", content="Hello."))
    spans = _spans(tokenizer, CONVERSATIONS, Conversation(messages=turns * 2, where="x:1"))
    opened, thought = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    assert _learned_runs(spans) == {
        "sequence 1": [(opened, False), (f"{thought}Hello.<|im_end|>", True)],
        "sequence 2": [(f"{opened}Hello.<|im_end|>\n{opened}", False), (f"{thought}Hello.<|im_end|>", True)],
    }


def test_bars_cover_all_lengths() -> None:
    lines = [line.split() for line in histogram([1, 2, 3, 79, 80])]
    assert (len(lines), sum(int(line[-1]) for line in lines)) == (8, 5)
    assert (lines[0], lines[-1]) == (["1–10", "█" * 30, "3"], ["71–80", "█" * 20, "2"])


# ---- the page of a stage --------------------------------------------------------------------------------------------


def _spec(folder: Path, config: Any, rows: list[Any], **more: Any) -> Any:
    save_tiny_model(folder / "base")
    tiny_tokenizer().save_pretrained(str(folder / "base"))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_spec(folder, config, **more)


def _printed(folder: Path, config: Any, rows: list[Any], capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    show_stage(Console(width=200), _spec(folder, config, rows, **more), rows=1)
    return capsys.readouterr().out


OTHERS = DataConfig(source="", fraction=0.5, mix=[MixedConfig(share=0.25)])
CUT = TooLongConfig(do=TooLong.cut)


@pytest.mark.parametrize(
    ("config", "rows", "texts", "absent"),
    [
        (
            SftConfig(max_length=100),
            [SHORT, {"prompt": "Hi.", "completion": ""}, LONG],
            [
                *("format prompt_completion: ", "⟦Hello.<|im_end|>⟧", "2 records, ", "limit 100: 1 too long"),
                *("1 row faulty, such as ", "data.jsonl:2: 'completion' must be text and not empty"),
            ],
            "So.",  # one row was asked for
        ),
        (PpoConfig(), [{"prompt": "Hi."}], ["prompt: <|im_start|>system"], "learned"),
        # the beginning of the prompt is gone
        (
            SftConfig(max_length=40, too_long=CUT),
            [LONG],
            ["· cut: the row has ", "limit 40: 0 too long, 1 cut"],
            "system",
        ),
        (
            SftConfig(max_length=60),
            [SHORT, LONG],
            ["the stage would stop: 1 dropped of 2 rows because they are too long, more than 10%"],
            "if the other",
        ),
        (SftConfig(), [SHORT, {"prompt": "Hi.", "completion": 5}], ["would stop: 'completion' must be text"], "if the"),
        (SftConfig(), [SHORT, LONG], ["2 records, "], "would stop"),
        (
            SftConfig(data=OTHERS),
            [{"prompt": f"{number}?", "completion": "Yes."} for number in range(6)],
            ["data.fraction=0.5: about 3 of these are used", "mixed in: 25% of all rows", "⟦Good.<|im_end|>⟧"],
            "would stop",
        ),
        (
            DpoConfig(data=DataConfig(mix=[MixedConfig(count=1)])),
            [PAIR],
            ["chosen: ⟦Hello.<|im_end|>⟧", "rejected: ⟦Go.<|im_end|>⟧", "chosen: ⟦Good.<|im_end|>⟧"],
            "would stop",
        ),
    ],
    ids=["SFT", "PPO", "cut", "too long", "faulty", "good", "a part", "mixed"],
)
def test_a_stage_shows_rows_counts_and_what_is_wrong(
    config: Any, rows: list[Any], texts: list[str], absent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    mixed_in = PAIR | {"chosen": "Good."} if isinstance(config, DpoConfig) else SHORT | {"completion": "Good."}
    other.write_text(json.dumps(mixed_in) + "\n")
    more = {"extra_data": {"data.mix[0]": other}} if config.data.mix else {}
    printed = _printed(tmp_path, config, rows, capsys, **more)
    assert [text for text in texts if text not in printed] == []
    assert absent not in printed
    assert isinstance(config, PpoConfig) or printed.count("learned; longest") == 1 + len(config.data.mix)


def test_what_a_template_drops_and_changes_is_counted_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    asked = {"role": "user", "content": "2 + 2?"}
    rows = [
        {"messages": [asked, thought]},
        {"messages": [asked, {**thought, "reasoning_content": "Hm."}, asked, thought]},
    ]
    model = ModelConfig(source=BASE_SOURCE, chat_template="trl:qwen3")
    printed = _printed(tmp_path, SftConfig(max_length=200), rows, capsys, model=model)
    assert "1 record becomes several rows, " in printed
    assert "1 record loses thoughts of earlier turns " in printed
    assert printed.count("data.jsonl:2") == 2
    assert "⟦<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>⟧" in printed
    unthinking = replace(model, template_options={"enable_thinking": False})
    answers = [{"messages": [asked, {"role": "assistant", "content": "Four."}]}]
    printed = _printed(tmp_path, SftConfig(), [*answers, *rows], capsys, model=unthinking)
    assert "\n</think>\n\n⟦Four.<|im_end|>⟧" in printed
    assert "2 rows faulty, such as " in printed
    assert "→ set model.template_options.enable_thinking=true" in printed


def test_odd_rows_are_counted_with_an_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "When does the shop in the hall open and who has the keys of it?"
    control = {"prompt": "Hi.", "completion": "The end: <|im_end|>"}
    spec = _spec(tmp_path, SftConfig(max_length=100), [{"prompt": asked, "completion": "At nine."}, control, control])
    held_out = HeldOut([LocatedText(where="heldout.jsonl:7", text=asked.upper())])
    show_stage(Console(width=300), spec, rows=1, held_out=held_out)
    printed = capsys.readouterr().out
    assert f"1 record repeats an earlier one, such as {tmp_path}/data.jsonl:3" in printed
    assert "2 records have text that looks like a control token" in printed
    assert "1 record resembles a prompt of the evaluation, such as " in printed
    assert "which has 100% of heldout.jsonl:7" in printed


def test_what_would_stop_the_stage_is_not_known_from_the_first_records_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.commands.preview.worker.LOOKED_AT", 2)
    rows, stops = [SHORT, LONG, *[SHORT] * 20], "the stage would stop: 1 dropped of 2 rows "
    printed = _printed(tmp_path, SftConfig(max_length=60), rows, capsys)
    assert f"\nif the other records are like the first 2, {stops}" in printed
    printed = _printed(tmp_path, SftConfig(max_length=60, data=DataConfig(limit=2)), rows, capsys)
    assert f"\n{stops}" in printed, "it reads no others"


def test_the_page_shows_what_the_terminal_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(tmp_path, SftConfig(max_length=100), [SHORT | {"completion": "<b>Hello</b>."}])
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


SHAPES: list[tuple[Path, type[Any]]] = [
    (WRITTEN / "transcripts.jsonl", RewardConfig),
    (WRITTEN / "labelled.json", SftConfig),
    (WRITTEN / "toolcalls.json", SftConfig),
    (WRITTEN / "identity.json", SftConfig),
    (WRITTEN / "texts.jsonl", CptConfig),
    (WRITTEN / "questions.jsonl", PpoConfig),
    (WRITTEN / "whole_pairs.json", DpoConfig),
    (PUBLIC / "hh-rlhf/harmless_base.jsonl", DpoConfig),
    (PUBLIC / "llamafactory-demo/glaive_toolcall_en_demo.json", SftConfig),
    (PUBLIC / "mt-bench/question.jsonl", PpoConfig),
]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        pytest.param(file, kind, id=file.name, marks=[needs_public_data] if PUBLIC in file.parents else [])
        for file, kind in SHAPES
    ],
)
def test_files_in_public_shapes_are_shown_as_they_are(
    file: Path, kind: type[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template that knows tools."""
    styled_tokenizer("qwen").save_pretrained(str(tmp_path / "base"))
    data = DataConfig(source="", limit=300, placeholders={"name": "Ada", "author": "Bob"})
    show_stage(Console(width=200), tiny_spec(tmp_path, kind(data=data), data_path=file), rows=2)
    printed = capsys.readouterr().out
    assert "record" in printed
    assert "faulty" not in printed
    assert "{{" not in printed or file.name != "identity.json"
    assert ("<tools>" in printed) == ("toolcall" in file.name)
