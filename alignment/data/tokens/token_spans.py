"""Token rows in a readable form: spans of decoded tokens, and a histogram of lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from alignment.data.tokens.limits import Parts
from alignment.data.tokens.rendering import control_tokens, in_common
from alignment.data.tokens.row_kinds import Tokenized
from alignment.data.tokens.tokenize import Tokens

BARS = 8
WIDTH = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSpan:
    """The text of neighbouring tokens that agree in all properties. They are all ``learned`` or not, all ``control``
    tokens or not, and all in the part where two answers differ or not."""

    text: str
    learned: bool
    control: bool
    differs: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordSpans:
    """The token spans of a record as the stage reads it: one sequence, several sequences of a conversation, or a prompt
    and its answers by name. ``tokens`` counts the longest sequence before anything was ``cut``, ``learned`` all learned
    tokens. With ``has_lookalikes`` some of the text looks like a control token but is ordinary text."""

    where: str
    sequences: dict[str, list[TokenSpan]]
    tokens: int
    learned: int
    has_lookalikes: bool
    cut: str = ""


def record_spans(tokenizer: Any, tokenized: Tokenized) -> RecordSpans:
    """Decodes the tokens of a record without a fault, including control tokens."""
    assert tokenized.parts, "a record with a fault has no tokens"
    control = control_tokens(tokenizer)
    sequences = _sequences(tokenized)
    differ = _differences(tokenized.parts[0])
    text = "".join(tokenizer.decode(tokens.ids) for tokens in sequences.values())
    real = sum(token in control.ids.values() for tokens in sequences.values() for token in tokens.ids)
    return RecordSpans(
        where=tokenized.record.where,
        sequences={name: _token_spans(tokenizer, tokens, differ.get(name)) for name, tokens in sequences.items()},
        tokens=tokenized.tokens,
        learned=sum(sum(tokens.learned) for tokens in sequences.values()),
        has_lookalikes=len(control.pattern.findall(text)) > real,
        cut=tokenized.cut,
    )


def _sequences(tokenized: Tokenized) -> dict[str, Tokens]:
    parts = tokenized.parts[0]
    if "text" in parts.answers:
        rows = [row["input_ids"] for row in tokenized.rows]
        return {f"row {number}": Tokens(ids=ids, learned=[True] * len(ids)) for number, ids in enumerate(rows, start=1)}
    if "answer" in parts.answers:
        whole = [sequence.prompt + sequence.answers["answer"] for sequence in tokenized.parts]
        return {f"sequence {index}" if len(whole) > 1 else "": tokens for index, tokens in enumerate(whole, start=1)}
    return {"prompt": parts.prompt, **parts.answers}


def _differences(parts: Parts) -> dict[str, range]:
    """The range of each of two answers between their common beginning and their common end."""
    answers = {name: tokens.ids for name, tokens in parts.answers.items()}
    if len(answers) != 2:
        return {}
    start = in_common(*answers.values())
    end = in_common(*(ids[start:][::-1] for ids in answers.values()))
    return {name: range(start, len(ids) - end) for name, ids in answers.items()}


def _token_spans(tokenizer: Any, tokens: Tokens, differs: range | None) -> list[TokenSpan]:
    control = set(control_tokens(tokenizer).ids.values())
    marked = [
        (token, (learned, token in control, differs is not None and index in differs))
        for index, (token, learned) in enumerate(zip(tokens.ids, tokens.learned, strict=True))
    ]
    return [
        TokenSpan(text=tokenizer.decode([token for token, _ in span]), learned=key[0], control=key[1], differs=key[2])
        for key, span in groupby(marked, key=lambda pair: pair[1])
    ]


def histogram(lengths: Sequence[int]) -> list[str]:
    """Lines with a bar for each of ``BARS`` equal ranges of lengths."""
    step = -(-max(lengths) // BARS)
    counts = [0] * BARS
    for length in lengths:
        counts[min(BARS - 1, (length - 1) // step)] += 1
    most = max(counts)
    return [
        f"  {bar * step + 1:>6}–{(bar + 1) * step:<6} {'█' * round(WIDTH * count / most)} {count:,}".rstrip()
        for bar, count in enumerate(counts)
    ]
