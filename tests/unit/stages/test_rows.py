"""A stage's rows: mixed in the shares asked for, in nested parts, the same on every process, all losses noted."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from alignment.config.data import DataConfig, MixedConfig, OnError
from alignment.config.too_long import TooLong, TooLongConfig
from alignment.core.errors import DataError
from alignment.data.records import Conversation, Prompt
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import CONVERSATIONS, LABELLED_ANSWERS, PROMPTS
from alignment.data.turns import Message
from alignment.records.left_out import FILE as LEFT_OUT
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sft.config import SftConfig
from alignment.stages.shared.stage_rows import fitting, rows_of, selected, token_rows
from alignment.training.context import StageContext
from tests.real_templates import QWEN, dressed, text_of
from tests.tiny import tiny_spec, tiny_tokenizer

WIDE = Limits(row=200)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with ChatML turns."""
    return tiny_tokenizer()


def _write(path: Path, name: str, count: int) -> Path:
    rows = ({"prompt": f"{name} {number}?", "completion": f"{name}{number}."} for number in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _context(folder: Path, *, rank: int = 0, world_size: int = 1, **changes: Any) -> StageContext:
    return StageContext(spec=tiny_spec(folder, SftConfig(), **changes), rank=rank, world_size=world_size)


def _answers(tokenizer: Any, rows: Any) -> list[str]:
    return [tokenizer.decode([token for token in row["labels"] if token != -100]) for row in rows]


def _left_out(context: StageContext) -> list[dict[str, str]]:
    file = context.content / LEFT_OUT
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_a_mix_has_its_shares_and_is_the_same_on_every_process(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 800)
    replay = _write(tmp_path / "replay.jsonl", "general", 500)
    data = DataConfig(source="", mix=[MixedConfig(share=0.2)])
    mixes: list[Sequence[str]] = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2), (0, 1)):
        context = _context(tmp_path, rank=rank, world_size=world_size, extra_data={"data.mix[0]": replay})
        rows, counts = token_rows(context, CONVERSATIONS, data, WIDE, tokenizer)
        mixes.append(_answers(tokenizer, rows))
        assert counts["rows"] == len(rows) == 1000
    share = sum(text.startswith("general") for text in mixes[0]) / len(mixes[0])
    assert share == pytest.approx(0.2, abs=0.01)
    assert len(set(mixes[0])) == 1000
    assert all(other == mixes[0] for other in mixes[1:])


def test_another_seed_mixes_other_rows(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 8)
    replay = _write(tmp_path / "replay.jsonl", "general", 50)
    data = DataConfig(source="", mix=[MixedConfig(count=4)])
    first, other = (
        _answers(
            tokenizer,
            token_rows(
                _context(tmp_path, seed=seed, extra_data={"data.mix[0]": replay}), CONVERSATIONS, data, WIDE, tokenizer
            )[0],
        )
        for seed in (0, 1)
    )
    assert set(first) != set(other)


def test_parts_are_nested_whatever_the_stage_is_called(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 40)
    parts = []
    for name, fraction in (("sft_25", 0.25), ("sft_50", 0.5), ("sft", 1.0)):
        context = _context(tmp_path, stage=name)
        rows, _ = token_rows(context, CONVERSATIONS, DataConfig(source="", fraction=fraction), WIDE, tokenizer)
        parts.append(_answers(tokenizer, rows))
    assert [len(part) for part in parts] == [10, 20, 40]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    assert parts[1] == [text for text in parts[2] if text in parts[1]], "in the order of the source"


def test_records_are_mixed_as_token_rows_are(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 40)
    replay = _write(tmp_path / "replay.jsonl", "general", 30)
    data = DataConfig(source="", mix=[MixedConfig(count=7)], fraction=0.5)
    context = _context(tmp_path, extra_data={"data.mix[0]": replay})
    records = rows_of(context, Conversation, data)
    rows, _ = token_rows(context, CONVERSATIONS, data, WIDE, tokenizer)
    assert [f"{record.messages[-1].content}<|im_end|>" for record in records] == _answers(tokenizer, rows)


def test_selected_rows_are_those_that_select_gives() -> None:
    rows = Dataset.from_dict({"n": list(range(10)), "ids": [[n] * n for n in range(10)]})
    every: list[Sequence[int]] = [[3, 1, 4], range(10), [9], range(2, 5), [0, 9, 5, 7]]
    for indices in every:
        ours, expected = selected(rows, np.array(indices)), rows.select(list(indices))
        assert ours.to_list() == expected.to_list()
        assert ours.features == expected.features
        again = [len(ours) - 1, 0]
        assert ours.select(again).to_list() == expected.select(again).to_list(), "selected once more"
    assert len({selected(rows, np.array(indices))._fingerprint for indices in every}) == len(every)


def test_selecting_rows_makes_no_python_integers() -> None:
    """``select`` makes one for each row, and a list of them."""

    def peak(count: int) -> int:
        rows = Dataset.from_dict({"n": np.zeros(count)})
        indices = np.random.default_rng(0).permutation(count)
        tracemalloc.start()
        selected(rows, indices)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(100)  # imports, and caches
    assert (peak(40_000) - peak(20_000)) / 20_000 <= 16


def test_every_loss_is_in_the_list_beside_the_result(tmp_path: Path, tokenizer: Any) -> None:
    file = _write(tmp_path / "data.jsonl", "own", 40)
    with file.open("a") as stream:
        stream.write('{"prompt": "Hi.", "completion": 5}\n{"prompt": "Hi.", "completion": "' + "Long. " * 200 + '"}\n')
    context = _context(tmp_path)
    data = DataConfig(source="", on_error=OnError.skip)
    for _ in range(2):  # an attempt after an interruption begins the list anew
        _, counts = token_rows(context, CONVERSATIONS, data, WIDE, tokenizer)
        assert [(entry["where"], entry["kind"]) for entry in _left_out(context)] == [
            (f"{file}:41", "fault"),
            (f"{file}:42", "too long"),
        ]
    (announced,) = set(context.notes)
    assert announced.startswith(f"2 of 42 rows of {file} were left out or cut, for example {file}:41: 'completion' ")
    assert announced.endswith(f" (all are in {context.spec.artifact}/left_out.jsonl)")
    assert counts == {"rows": 40.0, "rows_too_long": 1.0, "rows_cut": 0.0}


def test_a_row_of_several_records_is_counted_once(tmp_path: Path, tokenizer: Any) -> None:
    """Both answers of the pair are too long behind its prompt."""
    file, answers = tmp_path / "data.jsonl", {"chosen": "Yes.", "rejected": "No."}
    rows = [{"prompt": question, **answers} for question in (*(f"{number}?" for number in range(40)), "Why? " * 200)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = _context(tmp_path)
    _, counts = token_rows(context, LABELLED_ANSWERS, DataConfig(source=""), WIDE, tokenizer)
    assert [entry["where"] for entry in _left_out(context)] == [f"{file}:41", f"{file}:41"]
    assert (counts["rows"], counts["rows_too_long"]) == (80.0, 2.0)
    (note,) = context.notes
    assert note.startswith(f"1 of 41 rows of {file} was left out or cut, for example {file}:41: ")


def test_nothing_left_out_leaves_no_list(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 4)
    context = _context(tmp_path)
    token_rows(context, CONVERSATIONS, DataConfig(source=""), WIDE, tokenizer)
    assert _left_out(context) == []
    assert not (context.content / LEFT_OUT).exists()


def _prompts(folder: Path) -> list[Prompt]:
    rows = [{"prompt": f"{number}?"} for number in range(20)] + [{"prompt": "Why? " * 200}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows_of(StageContext(spec=tiny_spec(folder, PpoConfig()), rank=0, world_size=1), Prompt, DataConfig())


@pytest.mark.parametrize(("do", "num_rows"), [(TooLong.drop, 20), (TooLong.cut, 21)])
def test_prompts_that_are_too_long_are_dropped_or_cut_and_noted(
    tmp_path: Path, tokenizer: Any, do: TooLong, num_rows: int
) -> None:
    records = _prompts(tmp_path)
    context = StageContext(spec=tiny_spec(tmp_path, PpoConfig()), rank=0, world_size=1)
    limits = Limits(row=60, too_long=TooLongConfig(do=do))
    fitted, counts = fitting(context, PROMPTS, records, DataConfig(), limits, tokenizer)
    assert list(fitted) == list(range(num_rows))
    assert all(len(record.rows[0]["prompt"]) <= 60 for record in fitted.values())
    assert counts == {"rows": num_rows, "rows_too_long": 21 - num_rows, "rows_cut": num_rows - 20}
    (entry,) = _left_out(context)
    assert entry["where"] == f"{tmp_path}/data.jsonl:21"
    assert entry["kind"] == ("cut" if do is TooLong.cut else "too long")
    assert context.notes[0].startswith(f"1 of 21 records was left out or cut, for example {entry['where']}: ")


def test_prompts_that_cannot_be_rendered_are_skipped_where_faults_are(tmp_path: Path) -> None:
    records = _prompts(tmp_path)[:20]
    context = StageContext(spec=tiny_spec(tmp_path, PpoConfig()), rank=0, world_size=1)
    picky = tiny_tokenizer()
    picky.chat_template = "{% if '7' in messages[0]['content'] %}{{ raise_exception('no sevens') }}{% endif %}" + str(
        picky.chat_template
    )
    with pytest.raises(DataError, match="2 faulty rows:"):
        fitting(context, PROMPTS, records, DataConfig(), WIDE, picky)
    data = DataConfig(on_error=OnError.skip, max_skipped=0.5)
    fitted, counts = fitting(context, PROMPTS, records, data, WIDE, picky)
    assert len(fitted) == counts["rows"] == 18
    assert [(entry["where"][-2:], entry["kind"]) for entry in _left_out(context)] == [(":8", "fault"), ("18", "fault")]


def test_too_many_long_prompts_stop_the_stage(tmp_path: Path, tokenizer: Any) -> None:
    records = _prompts(tmp_path)[10:]
    context = StageContext(spec=tiny_spec(tmp_path, PpoConfig()), rank=0, world_size=1)
    limits = Limits(row=60, too_long=TooLongConfig(max_share=0.05))
    with pytest.raises(DataError, match="1 dropped of 11 rows because they are too long, more than 5%"):
        fitting(context, PROMPTS, records, DataConfig(), limits, tokenizer)


def test_what_a_template_leaves_out_is_noted_once_for_a_source(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Yes.", "thinking": "Hm."}
    first = {**answer, "thinking": "I look."}
    turns = [{"role": "user", "content": "Open?"}, first, {"role": "user", "content": "Sure?"}, answer]
    rows = [{"messages": turns, "id": str(number)} for number in range(3)]
    rows.append({"messages": turns[:2], "id": "one"})
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = dressed(QWEN, text_of("qwen3") or "")
    context = _context(tmp_path)
    table, counts = token_rows(context, CONVERSATIONS, DataConfig(source=""), WIDE, tokenizer)
    assert context.notes == [f"{file}: the chat template leaves out thoughts of earlier turns in 3 of 4 records"]
    texts = [f"<think>\n{thought}\n</think>\n\nYes.<|im_end|>" for thought in ("I look.", "Hm.")]
    assert _answers(tokenizer, table) == [*texts * 3, texts[0]]
    assert counts == {"rows": 7.0, "rows_too_long": 0.0, "rows_cut": 0.0}
    assert [note["kind"] for note in _left_out(context)] == ["lost: thoughts of earlier turns"] * 3
    again = _context(tmp_path)
    token_rows(again, CONVERSATIONS, DataConfig(source=""), WIDE, tokenizer)
    assert again.notes == context.notes, "rows from the cache too"
    prompts = [Prompt(messages=tuple(turn_of_row(turn) for turn in turns[:3]), where="x:1")]
    fitting(again, PROMPTS, prompts, DataConfig(source=""), WIDE, tokenizer)
    assert again.notes[1:] == ["stages.sft: the chat template leaves out thoughts of earlier turns in 1 of 1 records"]


def turn_of_row(turn: dict[str, str]) -> Message:
    return Message(role=turn["role"], content=turn["content"], thought=turn.get("thinking", ""))
