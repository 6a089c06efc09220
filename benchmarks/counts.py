"""Tokens of a step's rows: real ones, those that have to be computed, and those whose probability is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from alignment.data.tokens.rendering import in_common
from benchmarks.grid import Setting, micro_rows_of

ANSWER, MISMATCHED = "completion", "KL_completion"
"""Of labelled answers: the row's own answer, and the answer to another prompt that estimates the divergence."""


def counts_of(kind: str, tokens: list[Any]) -> dict[str, int]:
    """``tokens`` are real tokens, each sequence of a pair with its prompt in full; ``trunk_tokens`` (or
    ``prompt_tokens``) is what has to be computed, beginnings that sequences have in common once; ``scored_tokens`` are
    those whose probability is needed."""
    if kind == "sft":
        sequences = [row["input_ids"] for row in tokens]
        scored = sum(label != -100 for row in tokens for label in row["labels"])
    elif kind in ("reward", "dpo"):
        sequences = [row["prompt"] + row[answer] for row in tokens for answer in ("chosen", "rejected")]
        scored = sum(len(row["chosen"]) + len(row["rejected"]) for row in tokens) if kind == "dpo" else 0
    elif kind == "kto":
        return _counts_of_labelled(tokens)
    else:
        return {"prompt_tokens": _apart(tokens)}
    return {"tokens": sum(map(len, sequences)), "trunk_tokens": _apart(sequences), "scored_tokens": scored}


def _counts_of_labelled(tokens: list[Any]) -> dict[str, int]:
    """As ``counts_of``; also the tokens to compute of prompts with mismatched answers, and with both."""
    own, other = ([row["prompt"] + row[answer] for row in tokens] for answer in (ANSWER, MISMATCHED))
    return {
        "tokens": sum(map(len, own)),
        "trunk_tokens": _apart(own),
        "scored_tokens": sum(len(row[ANSWER]) for row in tokens),
        "mismatched_tokens": _apart(other),
        "reference_tokens": _apart([*own, *other]),
    }


def _apart(sequences: Sequence[list[int]]) -> int:
    """Tokens of sequences whose common beginnings count once: the nodes of their prefix tree."""
    ordered = sorted(sequences)
    return sum(map(len, ordered)) - sum(in_common(*two) for two in pairwise(ordered))


def padded_tokens(kind: str, rows: Sequence[Mapping[str, Any]], setting: Setting) -> int:
    """Positions of the sequences that a step learns from, padding included. ``rows`` are the step's rows, in order.

    Chosen and rejected answers of a micro-batch are padded to one length.
    """
    count, total = micro_rows_of(setting), 0
    for first in range(0, len(rows), count):
        lengths = [length for row in rows[first : first + count] for length in _lengths(kind, row)]
        total += sum(lengths) if setting.get("padding_free") else len(lengths) * max(lengths)
    return total


def _lengths(kind: str, row: Mapping[str, Any]) -> list[int]:
    if kind == "sft":
        return [len(row["input_ids"])]
    answers = (ANSWER,) if kind == "kto" else ("chosen", "rejected")
    return [len(row["prompt"]) + len(row[answer]) for answer in answers]
