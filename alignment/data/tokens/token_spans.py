"""Token rows as a person can read them, and what all rows of a source amount to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

from alignment.data.tokens.limits import Parts
from alignment.data.tokens.rendering import control_tokens
from alignment.data.tokens.row_kinds import Tokenized
from alignment.data.tokens.tokenize import Tokens

BARS = 8
WIDTH = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Neighbouring tokens as text: all of them learned or not, control tokens or not, and, of two answers, where they
    differ or not."""

    text: str
    learned: bool
    control: bool
    differs: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A record as the stage sees it: one sequence, or a prompt and its answers by name.

    ``tokens`` counts the longest sequence before anything was ``cut``, ``learned`` all learned tokens; with
    ``has_lookalikes`` some of the text reads like a control token and is none.
    """

    where: str
    sequences: dict[str, list[Run]]
    tokens: int
    learned: int
    has_lookalikes: bool
    cut: str = ""


def shown(tokenizer: Any, one: Tokenized) -> Shown:
    """The tokens of a record that has some, decoded again, control tokens with them."""
    assert one.parts is not None, "a record with a fault has no tokens"
    control = control_tokens(tokenizer)
    sequences = _sequences(one, one.parts)
    differ = _differences(one.parts)
    text = "".join(tokenizer.decode(tokens.ids) for tokens in sequences.values())
    real = sum(token in control.ids.values() for tokens in sequences.values() for token in tokens.ids)
    return Shown(
        where=one.record.where,
        sequences={name: _runs(tokenizer, tokens, differ.get(name)) for name, tokens in sequences.items()},
        tokens=one.tokens,
        learned=sum(sum(tokens.learned) for tokens in sequences.values()),
        has_lookalikes=len(control.pattern.findall(text)) > real,
        cut=one.cut,
    )


def _sequences(one: Tokenized, parts: Parts) -> dict[str, Tokens]:
    if "text" in parts.answers:
        rows = [row["input_ids"] for row in one.rows]
        return {f"row {number}": Tokens(ids=ids, learned=[True] * len(ids)) for number, ids in enumerate(rows, start=1)}
    if "answer" in parts.answers:
        return {"": parts.prompt + parts.answers["answer"]}
    return {"prompt": parts.prompt, **parts.answers}


def _differences(parts: Parts) -> dict[str, range]:
    """Where each of two answers differs from the other: what lies between a common beginning and a common end."""
    answers = {name: tokens.ids for name, tokens in parts.answers.items()}
    if len(answers) != 2:
        return {}
    start = in_common(*answers.values())
    end = in_common(*(ids[start:][::-1] for ids in answers.values()))
    return {name: range(start, len(ids) - end) for name, ids in answers.items()}


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _runs(tokenizer: Any, tokens: Tokens, differs: range | None) -> list[Run]:
    control = set(control_tokens(tokenizer).ids.values())
    marked = [
        (token, (learned, token in control, differs is not None and place in differs))
        for place, (token, learned) in enumerate(zip(tokens.ids, tokens.learned, strict=True))
    ]
    return [
        Run(text=tokenizer.decode([token for token, _ in run]), learned=key[0], control=key[1], differs=key[2])
        for key, run in groupby(marked, key=lambda pair: pair[1])
    ]


def histogram(lengths: Sequence[int]) -> list[str]:
    """A bar for each of some equal ranges of lengths."""
    step = -(-max(lengths) // BARS)
    counts = [0] * BARS
    for length in lengths:
        counts[min(BARS - 1, (length - 1) // step)] += 1
    most = max(counts)
    return [
        f"  {place * step + 1:>6}–{(place + 1) * step:<6} {'█' * round(WIDTH * count / most)} {count:,}".rstrip()
        for place, count in enumerate(counts)
    ]
