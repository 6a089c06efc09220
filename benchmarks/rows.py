"""Rows from a folder of public data, or from the data that ships with the project; and who gets which.

Nothing here is tokenised yet. Every contestant of a repetition gets the same rows: ``taken`` is the one place where
that is decided.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")
Message = dict[str, str]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FOREIGN = {"conversations": "alpaca_en_demo.json", "pairs": "dpo_en_demo.json"}
_SHIPPED = {"conversations": "conversations.jsonl", "pairs": "preferences.jsonl"}


def taken(rows: Sequence[Row], repetition: int, count: int) -> list[Row]:
    """Rows ``count * repetition`` and following; from the start again where there are too few.

    Raises:
        ValueError: fewer rows than one repetition needs.
    """
    if len(rows) < count:
        raise ValueError(f"{len(rows)} rows fit, but a repetition needs {count}")
    return [rows[(repetition * count + offset) % len(rows)] for offset in range(count)]


def conversations(folder: Path | None) -> list[dict[str, Any]]:
    """``{"messages": [user, assistant]}`` rows."""
    path = source("conversations", folder)
    if folder is None:
        return [{"messages": row["messages"]} for row in _jsonl(path)]
    return [{"messages": [*_question(row), _turn("assistant", row["output"])]} for row in _json(path) if row["output"]]


def pairs(folder: Path | None) -> list[dict[str, Any]]:
    """``{"messages": [… user], "chosen": text, "rejected": text}`` rows."""
    path = source("pairs", folder)
    if folder is None:
        return [{name: row[name] for name in ("messages", "chosen", "rejected")} for row in _jsonl(path)]
    return [
        {
            "messages": [_turn(_ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]],
            "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"],
        }
        for row in _json(path)
    ]


def answers(folder: Path | None) -> list[dict[str, Any]]:
    """``{"messages": [… user], "completion": text, "label": bool}`` rows: an answer of each pair.

    In turn it is the chosen and the rejected one.
    """
    return [
        {
            "messages": row["messages"],
            "completion": row["rejected" if number % 2 else "chosen"],
            "label": not number % 2,
        }
        for number, row in enumerate(pairs(folder))
    ]


def prompts(folder: Path | None) -> list[dict[str, Any]]:
    """``{"messages": [user]}`` rows: the conversations without their answers."""
    return [{"messages": row["messages"][:-1]} for row in conversations(folder)]


def source(kind: str, folder: Path | None) -> Path:
    """The file that rows of a kind (``conversations`` or ``pairs``) come from.

    Raises:
        FileNotFoundError: ``folder`` has no such file, however deep.
    """
    if folder is None:
        return Path(__file__).resolve().parents[1] / "data" / "quickstart" / _SHIPPED[kind]
    files = sorted(folder.rglob(_FOREIGN[kind]))
    if not files:
        raise FileNotFoundError(f"no {_FOREIGN[kind]} below the folder of --data")
    return files[0]


def described(kind: str, folder: Path | None) -> dict[str, str]:
    """Name and SHA-256 of the file, without its path."""
    path = source(kind, folder)
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _question(row: dict[str, str]) -> list[Message]:
    return [_turn("user", "\n".join(part for part in (row["instruction"], row.get("input", "")) if part))]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _json(path: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
