"""A stage's rows: mixed in the shares asked for, in nested parts, the same on every process, all losses noted; and how
sampled answers become rows."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from alignment.config.data import DataConfig, MixedConfig, OnError, TooLong, TooLongConfig
from alignment.core.errors import DataError
from alignment.data.records import Conversation, Prompt
from alignment.data.tokens.row_kinds import CONVERSATIONS, LABELLED_ANSWERS, PROMPTS, Limits
from alignment.data.turns import Message
from alignment.records.stages import LEFT_OUT_FILE as LEFT_OUT
from alignment.stages.ppo.config import PpoConfig
from alignment.stages.sample.kind import SampleConfig, Select
from alignment.stages.sample.selected_rows import (
    EMPTY,
    NO_END,
    REPEATED,
    Candidate,
    OfPrompt,
    best,
    is_tied,
    labels,
    left_out,
    pairs,
    rows_of_prompt,
)
from alignment.stages.sft.kind import SftConfig
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


def test_records_and_parts_are_drawn_whatever_the_stage_is_called(tmp_path: Path, tokenizer: Any) -> None:
    _write(tmp_path / "data.jsonl", "own", 40)
    parts = []
    for name, fraction in (("sft_25", 0.25), ("sft_50", 0.5), ("sft", 1.0)):
        context = _context(tmp_path, stage=name)
        rows, _ = token_rows(context, CONVERSATIONS, DataConfig(source="", fraction=fraction), WIDE, tokenizer)
        parts.append(_answers(tokenizer, rows))
        assert not (context.content / LEFT_OUT).exists(), "nothing is left out"
    assert [len(part) for part in parts] == [10, 20, 40]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    assert parts[1] == [text for text in parts[2] if text in parts[1]], "in the order of the source"
    _write(tmp_path / "data.jsonl", "own", 40)
    replay = _write(tmp_path / "replay.jsonl", "general", 30)
    data = DataConfig(source="", mix=[MixedConfig(count=7)], fraction=0.5)
    context = _context(tmp_path, extra_data={"data.mix[0]": replay})
    records = rows_of(context, Conversation, data)
    rows, _ = token_rows(context, CONVERSATIONS, data, WIDE, tokenizer)
    assert [f"{record.messages[-1].content}<|im_end|>" for record in records] == _answers(tokenizer, rows)
    other_seed = rows_of(_context(tmp_path, seed=1, extra_data={"data.mix[0]": replay}), Conversation, data)
    assert {record.messages[-1].content for record in other_seed} != {record.messages[-1].content for record in records}


def test_selected_rows_are_those_that_select_gives_and_cost_no_python_integers() -> None:
    rows = Dataset.from_dict({"n": list(range(10)), "ids": [[n] * n for n in range(10)]})
    every: list[Sequence[int]] = [[3, 1, 4], range(10), [9], range(2, 5), [0, 9, 5, 7]]
    for indices in every:
        ours, expected = selected(rows, np.array(indices)), rows.select(list(indices))
        assert ours.to_list() == expected.to_list()
        assert ours.features == expected.features
        again = [len(ours) - 1, 0]
        assert ours.select(again).to_list() == expected.select(again).to_list(), "selected once more"
    assert len({selected(rows, np.array(indices))._fingerprint for indices in every}) == len(every)

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


def test_prompts_that_cannot_be_rendered_are_skipped_and_too_many_long_ones_stop_the_stage(
    tmp_path: Path, tokenizer: Any
) -> None:
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


def candidate(text: str, score: float = 0.0, *, ended: bool = True) -> Candidate:
    return Candidate(text=text, score=score, ended=ended)


BY_ANSWER = {0: 1.0, 1: 3.0, 2: 0.5, 3: 3.0}


@pytest.mark.parametrize(
    ("every", "min_margin", "expected"),
    [
        (False, 2.5, [(1, 2)]),
        (False, 2.6, []),
        (True, 0.0, [(1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        (True, 2.0, [(1, 0), (1, 2), (3, 0), (3, 2)]),
    ],
)
def test_pairs_differ_by_the_margin_and_the_better_answer_is_first(
    every: bool, min_margin: float, expected: list[tuple[int, int]]
) -> None:
    assert pairs(BY_ANSWER, every=every, min_margin=min_margin) == expected


def test_equal_scores_are_no_pair_have_no_label_and_may_be_rounded() -> None:
    tied = {0: 0.1, 1: 0.1, 2: 0.1}  # the mean of these is rounded to more than 0.1
    assert pairs(tied, every=True, min_margin=0.0) == pairs({0: 1.0}, every=False, min_margin=0.0) == []
    assert labels(tied, None) == labels({}, None) == {}
    assert [is_tied(scores) for scores in (tied, {0: 0.1}, BY_ANSWER)] == [True, False, False]
    assert labels({0: float32(0.9) + float32(-0.8) + float32(-0.1)}, 0.0) == {0: True}
    assert labels({0: float32(0.2), 1: float32(0.4), 2: float32(0.6)}, None) == {0: False, 2: True}
    assert pairs({0: float32(1000.0001), 1: 1000.0}, every=True, min_margin=0.001) == []


def float32(value: float) -> float:
    """As scores come from tensors."""
    return torch.tensor(value, dtype=torch.float32).item()


@pytest.mark.parametrize("threshold", [0.0, 0.7, -0.3, 1234.567])
def test_a_score_on_the_threshold_reaches_it_whatever_it_was_rounded_to(threshold: float) -> None:
    scores = {0: float32(threshold), 1: float32(threshold - 0.01)}
    assert labels(scores, threshold) == {0: True, 1: False}
    assert best({0: scores[0]}, threshold) == 0
    assert best({1: scores[1]}, threshold) is None


@pytest.mark.parametrize("better", [0.3, 0.7])
def test_scores_that_differ_by_the_margin_are_a_pair_whatever_they_were_rounded_to(better: float) -> None:
    scores = {0: float32(better), 1: float32(better - 0.1)}
    assert pairs(scores, every=True, min_margin=0.1) == [(0, 1)]
    assert pairs(scores, every=True, min_margin=0.101) == []


def test_empty_unended_and_repeated_answers_are_left_out() -> None:
    answers = [candidate(text) for text in ("Yes.", " ", "Yes. ", "No.")] + [candidate("No.", ended=False)]
    assert left_out(answers, ended_only=True) == {1: EMPTY, 2: REPEATED, 4: NO_END}
    assert left_out(answers, ended_only=False) == {1: EMPTY, 2: REPEATED, 4: REPEATED}
    unended_first = [candidate("No.", ended=False), candidate("No.")]
    assert left_out(unended_first, ended_only=True) == {0: NO_END}


def chosen_rows(select: Select, roles: tuple[str, ...] = ("user",), **settings: float) -> OfPrompt:
    turns = tuple(Message(role=role, content="Hi") for role in roles)
    prompt = Prompt(messages=turns, id="q1", task="greet")
    answers = [candidate("A", 1.0), candidate("B", 3.0), candidate("C", 0.0, ended=False), candidate("D", 2.0)]
    return rows_of_prompt(SampleConfig(select=select, **settings), prompt, answers)  # type: ignore[arg-type]


def test_rows_have_the_columns_of_their_format_and_the_prompt_s_labels() -> None:
    """The first of the highest scores is the best; samples are used as chosen where one pair has them so."""
    asked = {"role": "user", "content": "Hi"}
    own = {"id": "q1", "task": "greet", "messages": [asked]}
    turn = {"role": "assistant", "content": "B"}
    assert list(chosen_rows(Select.best).rows) == [{**own, "messages": [asked, turn], "score": 3.0}]
    scores = {"chosen_score": 3.0, "rejected_score": 1.0}
    assert list(chosen_rows(Select.best_worst).rows) == [{**own, "chosen": "B", "rejected": "A", **scores}]
    made = chosen_rows(Select.all_pairs)
    assert [(row["chosen"], row["rejected"]) for row in made.rows] == [("B", "D"), ("B", "A"), ("D", "A")]
    assert made.used == {1: "chosen", 3: "chosen", 0: "rejected"}
    assert list(chosen_rows(Select.labels, threshold=2.5).rows) == [
        {**own, "completion": "A", "label": False, "score": 1.0},
        {**own, "completion": "B", "label": True, "score": 3.0},
        {**own, "completion": "D", "label": False, "score": 2.0},
    ]
    assert [best(BY_ANSWER, threshold) for threshold in (None, 3.0, 3.5)] == [1, 1, None]
    assert best({}, None) is None
    (row,) = chosen_rows(Select.best, ("user", "assistant", "user")).rows
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]
