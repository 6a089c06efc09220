"""What the preview shows is what the stages learn from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment.commands.preview.worker import RecordSpans, main, record_spans, show_stage
from alignment.config.data import DataConfig, MixedConfig, TooLong, TooLongConfig
from alignment.data.records import Conversation, PreferencePair, Prompt
from alignment.data.tokens.row_kinds import CONVERSATIONS, PAIRS, PROMPTS, Kind, Limits, tokenized
from alignment.data.turns import Message
from alignment.stages.dpo.kind import DpoConfig
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.kind import SftConfig
from tests.tiny import save_tiny_model, tiny_spec, tiny_tokenizer

ASKED = (Message(role="user", content="Hi."),)
ROOT = Path(__file__).parents[3]
OPENED = "<|im_start|>system\nYou are tiny.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
SHORT = {"prompt": "Hi.", "completion": "Hello."}
LONG = {"prompt": "Why?" * 40, "completion": "So."}
PAIR = {"prompt": "Hi.", "chosen": "Hello.", "rejected": "Go."}


def _spans(tokenizer: Any, kind: Kind, record: Any) -> RecordSpans:
    (tokenized_record,) = tokenized(tokenizer, kind, [record], Limits(row=100))
    return record_spans(tokenizer, tokenized_record)


def _learned_runs(spans: RecordSpans) -> dict[str, list[tuple[str, bool]]]:
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
