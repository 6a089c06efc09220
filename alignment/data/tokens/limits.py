"""The maximum length of a row, and what happens to longer rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from alignment.config.data import Side, TooLong, TooLongConfig
from alignment.core.errors import DataError
from alignment.data.tokens.tokenize import Tokens


class RowTooLong(DataError):
    """A valid row that is longer than the stage allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Maximum numbers of tokens: of a whole row (with the longer of two answers), of its prompt and of an answer. In a
    conversation the answer is the last turn of the assistant, and the prompt is everything before it."""

    row: int
    prompt: int | None = None
    answer: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)

    @property
    def cuts(self) -> bool:
        """Whether long rows are cut instead of dropped."""
        return self.too_long.do is TooLong.cut


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A row's prompt, and its answers by name. The first ``head`` tokens of the prompt (BOS) and its last ``tail``
    tokens (what the template appends to the last turn's content) are never cut."""

    prompt: Tokens
    answers: Mapping[str, Tokens] = field(default_factory=dict)
    head: int = 0
    tail: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in the row."""
        return len(self.prompt) + max(map(len, self.answers.values()), default=0)


def excess(parts: Parts, limits: Limits) -> str:
    """A description of the limits that the row exceeds; empty if it exceeds none."""
    lengths = [("the row", parts.longest, limits.row), ("the prompt", len(parts.prompt), limits.prompt)]
    lengths += [(f"'{name}'", len(tokens), limits.answer) for name, tokens in parts.answers.items()]
    return ", ".join(
        f"{subject} has {length} tokens of {limit}"
        for subject, length, limit in lengths
        if limit is not None and length > limit
    )


def cut_to(parts: Parts, limits: Limits) -> Parts:
    """The parts, cut to their limits. Raises RowTooLong: cutting would leave no prompt, nothing to learn, or two equal
    answers."""
    over = excess(parts, limits)
    answers = {name: tokens[: limits.answer] for name, tokens in parts.answers.items()}
    room = limits.row - max(map(len, answers.values()), default=0)
    room = room if limits.prompt is None else min(room, limits.prompt)
    if room <= parts.head + parts.tail:
        raise RowTooLong(f"{over}; after a cut, nothing would be left of the prompt")
    prompt = _shortened(parts, room, limits.too_long.side)
    if answers and not any(any(part.learned) for part in (prompt, *answers.values())):
        raise RowTooLong(f"{over}; after a cut, nothing would be left to learn")
    ids = [tokens.ids for tokens in answers.values()]
    if len(ids) == 2 and ids[0] == ids[1]:
        raise RowTooLong(f"{over}; after a cut, its two answers would be the same")
    return replace(parts, prompt=prompt, answers=answers)


def _shortened(parts: Parts, room: int, side: Side) -> Tokens:
    prompt = parts.prompt
    if len(prompt) <= room:
        return prompt
    if side is Side.left:
        return prompt[: parts.head] + prompt[len(prompt) - (room - parts.head) :]
    return prompt[: room - parts.tail] + prompt[len(prompt) - parts.tail :]


def refuse_losses(limits: Limits, *, dropped: int, cut: int, records: int, longest: int, where: str) -> None:
    """Accepts a data set of which few enough records were dropped or cut. Raises DataError: too many were, or all were
    dropped. The error gives the length of the longest."""
    share = limits.too_long.max_share
    nothing_left = dropped == records > 0
    if not records or ((dropped + cut) / records <= share and not nothing_left):
        return
    counts = " and ".join(f"{count} {word}" for count, word in ((dropped, "dropped"), (cut, "cut")) if count)
    remedies = ["raise the stage's length limits"]
    remedies += [] if limits.cuts else ["set too_long.do=cut"]
    remedies += [] if nothing_left else ["raise too_long.max_share"]
    raise DataError(
        f"{counts} of {records} rows because they are too long{'' if nothing_left else f', more than {share:.0%}'} "
        f"(the longest has {longest} tokens, the limit is {limits.row})",
        where=where,
        remedy=", or ".join(filter(None, [", ".join(remedies[:-1]), remedies[-1]])),
    )
