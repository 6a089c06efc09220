"""Rows of very unequal length, so that processes cut their shares of a batch into unequal numbers of micro-batches."""

from __future__ import annotations

import json
from pathlib import Path

TEXTS, CONVERSATIONS, PAIRS = "texts.jsonl", "conversations.jsonl", "pairs.jsonl"
"""What cpt, sft and all other stages read."""
QUESTIONS = (2, 70, 3, 85, 4, 2, 75, 3, 5, 90, 2, 80, 4, 3, 2, 65, 60, 3, 2, 95, 4, 70, 2, 3)
"""Words of each row's question: of a share of a batch it depends on its few long rows how it is cut."""
WORDS = (24, 35, 23, 36, 24, 22, 35, 24, 36, 23, 35, 24, 22, 24, 35, 36, 23, 24, 35, 22, 36, 35, 24, 23)
"""Words of plain texts, of which no two fit in a row of 64 tokens."""
_TEXT = ("the", "note", "says", "that", "the", "keys", "are", "with", "the", "caretaker", "in", "the", "hall")


def write_rows(folder: Path) -> None:
    asked = [{"role": "user", "content": f"{row}: {_words(words)}"} for row, words in enumerate(QUESTIONS)]
    answers = [_words(2 + number % 3) + "." for number in range(len(QUESTIONS))]
    conversations = [
        {"messages": [question, {"role": "assistant", "content": answer}]}
        for question, answer in zip(asked, answers, strict=True)
    ]
    pairs = [
        {"prompt": [question], "chosen": answer, "rejected": answer + " is closed"}
        for question, answer in zip(asked, answers, strict=True)
    ]
    _write(folder / TEXTS, [{"text": _words(number)} for number in WORDS])
    _write(folder / CONVERSATIONS, conversations)
    _write(folder / PAIRS, pairs)


def _words(number: int) -> str:
    return " ".join(_TEXT[(number + offset) % len(_TEXT)] for offset in range(number))


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
