"""How many tokens rows have, and that no stage begins to learn while a row is longer than the model's positions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from alignment.config.data import DataConfig
from alignment.config.replay import PtxConfig
from alignment.config.validation import ValidationConfig
from alignment.core.errors import ModelError
from alignment.records.step_log import METRICS
from alignment.training import row_lengths
from alignment.training.row_lengths import longest_sequences, row_tokens
from tests.chained import DATA, FILES, LORA, Chained, config_of
from tests.tiny import save_tiny_model

POSITIONS = 1200
"""More than any of the shipped rows has tokens."""


def test_tokens_are_counted_in_the_columns_that_hold_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lengths, "BLOCK", 2)
    pairs = Dataset.from_dict(
        {
            "prompt_ids": [[1], [1, 2], [3]],
            "chosen_ids": [[1, 2, 3], [4], [5]],
            "rejected_ids": [[9, 9], [9], []],
            "KL_completion_ids": [[9, 9, 9]] * 3,
            "margin": [0.5, 1.0, 2.0],
        }
    )
    assert row_tokens(pairs).tolist() == [6, 4, 2]
    assert row_tokens(pairs.select([2, 0])).tolist() == [2, 6]
    assert row_tokens(pairs, prompts_twice=True).tolist() == [7, 6, 3]
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    assert row_tokens(rows).tolist() == [3, 1]


def test_a_sequence_is_a_prompt_with_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_lengths, "BLOCK", 2)
    answers = Dataset.from_dict(
        {
            "prompt_ids": [[1], [1, 2], [3]],
            "completion_ids": [[1, 2, 3], [4], []],
            "KL_completion_ids": [[9], [9, 9], []],
            "label": [True, False, True],
        }
    )
    assert longest_sequences(answers).tolist() == [4, 4, 1]
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]})
    assert longest_sequences(rows).tolist() == [3, 1]
    packed = Dataset.from_dict({"input_ids": [[1] * 7, [2] * 5, [3] * 2], "seq_lengths": [[3, 4], [5], [1, 1]]})
    assert longest_sequences(packed).tolist() == [4, 5, 1]


def with_a_long_row(folder: Path, kind: str) -> Path:
    """Eight of the shipped rows after the first eight; the third has a very long answer, or prompt for PPO."""
    file = folder / "rows.jsonl"
    shipped = (DATA / f"{FILES.get(kind, 'preferences')}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in shipped[8:16]]
    if kind in ("sft", "ppo"):
        rows[2]["messages"][-1]["content"] += " the hall" * 1000
    else:
        rows[2]["chosen"] += " the hall" * 1000
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def refusal(folder: Path, kind: str, **changes: Any) -> str:
    """What the stage says of ``with_a_long_row`` before it takes a step, for a model of ``POSITIONS`` positions."""
    chained = Chained(folder)
    if kind == "ppo":
        chained.run("reward", LORA)
    save_tiny_model(chained.base, max_position_embeddings=POSITIONS)
    settings = {"config": config_of(kind, LORA), "data_path": with_a_long_row(folder, kind), **changes}
    with pytest.raises(ModelError) as raised:
        chained.run(kind, LORA, **settings)
    assert not (chained.spec(kind, LORA).work / "content" / METRICS).exists(), "no step was taken"
    return str(raised.value)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo", "kto", "ppo"])
def test_a_row_beyond_the_positions_stops_a_stage_before_it_learns(kind: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, kind)
    assert re.search(rf"rows\.jsonl:3: a row of \d+ tokens is longer than the model's {POSITIONS} positions", message)


def test_mismatched_answers_are_cut_to_the_positions_where_these_are_fewer(tmp_path: Path) -> None:
    """Each row fits, but a long prompt and the long answer of another row would not."""
    question, answer = [{"role": "user", "content": "Why?" + " the hall" * 300}], " the hall" * 300
    rows = [
        {"messages": question, "chosen": "Yes.", "rejected": "No."},
        {"messages": [{"role": "user", "content": "Where?"}], "chosen": answer, "rejected": f"Not {answer}"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    chained = Chained(tmp_path / "chained")
    save_tiny_model(chained.base, max_position_embeddings=POSITIONS)
    steps = chained.run("kto", LORA, data_path=data)
    assert all(math.isfinite(step["kl"]) for step in steps if "kl" in step)


def test_a_reference_does_not_read_rows_that_are_too_long(tmp_path: Path) -> None:
    config: Any = config_of("dpo", LORA)
    assert "rows.jsonl:3: a row of" in refusal(tmp_path, "dpo", config=replace(config, precompute_reference=True))


def test_conversations_beside_ppo_are_checked_before_its_first_update(tmp_path: Path) -> None:
    (tmp_path / "ptx").mkdir()
    conversations = with_a_long_row(tmp_path / "ptx", "sft")
    ptx = PtxConfig(coefficient=1.0, data=DataConfig(source=f"path:{conversations}"))
    message = refusal(
        tmp_path,
        "ppo",
        config=config_of("ppo", LORA, ptx=ptx),
        data_path=DATA / "preferences.jsonl",
        extra_data={"ptx.data": conversations},
    )
    assert message.startswith(f"{conversations}:3: a row of ")


def test_held_out_rows_are_checked_before_training_too(tmp_path: Path) -> None:
    held_out = with_a_long_row(tmp_path, "sft")
    validation = ValidationConfig(every=2, data=DataConfig(source=f"path:{held_out}"))
    message = refusal(
        tmp_path,
        "sft",
        config=config_of("sft", LORA, validation=validation),
        data_path=DATA / "conversations.jsonl",
        extra_data={"validation.data": held_out},
    )
    assert message.startswith("row 3 of the held-out rows: a row of ")
