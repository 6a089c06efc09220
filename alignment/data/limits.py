"""How long a row may be, and what is done to one that is longer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from alignment.config.stage import CptConfig, DpoConfig, PpoConfig, RewardConfig, SftConfig
from alignment.config.too_long import Side, TooLong, TooLongConfig
from alignment.data.tokenize import Tokens
from alignment.errors import DataError


class RowTooLong(DataError):
    """A row that is no fault, but longer than the stage allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Most tokens of a whole row (of the longer of two), of its prompt alone and of an answer alone.

    In a conversation the answer is the last turn of the assistant, and the prompt all before it.
    """

    row: int
    prompt: int | None = None
    answer: int | None = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)

    @classmethod
    def of(cls, config: CptConfig | SftConfig | RewardConfig | DpoConfig | PpoConfig) -> Self:
        """Those of a stage; continued pretraining cuts texts into rows, and PPO makes answers itself."""
        if isinstance(config, CptConfig):
            return cls(row=config.max_length)
        if isinstance(config, PpoConfig):
            return cls(row=config.max_prompt_length, too_long=config.too_long)
        return cls(
            row=config.max_length,
            prompt=config.max_prompt_length,
            answer=config.max_answer_length,
            too_long=config.too_long,
        )

    @property
    def cuts(self) -> bool:
        """Whether rows are cut, not dropped."""
        return self.too_long.do is TooLong.cut

    @property
    def keeps_tail(self) -> bool:
        """Whether prompts are cut in front of what the template puts behind the last turn."""
        return self.cuts and self.too_long.side is Side.right


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A row's prompt and its answers by name; the last ``tail`` tokens of the prompt are never cut from the right."""

    prompt: Tokens
    answers: Mapping[str, Tokens] = field(default_factory=dict)
    tail: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in the row."""
        return len(self.prompt) + max(map(len, self.answers.values()), default=0)


def fitted(parts: Parts, limits: Limits) -> tuple[Parts, str]:
    """The parts within their limits, and what was cut, in words; nothing if nothing was.

    Raises:
        RowTooLong: they are longer, and rows are not cut, or nothing would be left of the prompt.
    """
    over = _over(parts, limits)
    if not over:
        return parts, ""
    if not limits.cuts:
        raise RowTooLong(over)
    answers = {name: tokens[: limits.answer] for name, tokens in parts.answers.items()}
    room = limits.row - max(map(len, answers.values()), default=0)
    room = room if limits.prompt is None else min(room, limits.prompt)
    if room <= parts.tail:
        raise RowTooLong(f"{over}; cut, nothing would be left of the prompt")
    cut = Parts(prompt=_shortened(parts, room, limits), answers=answers, tail=parts.tail)
    if answers and not any(any(part.learned) for part in (cut.prompt, *answers.values())):
        raise RowTooLong(f"{over}; cut, nothing would be left to learn")
    return cut, over


def _shortened(parts: Parts, room: int, limits: Limits) -> Tokens:
    prompt = parts.prompt
    if len(prompt) <= room:
        return prompt
    if limits.too_long.side is Side.left:
        return prompt[len(prompt) - room :]
    return prompt[: room - parts.tail] + prompt[len(prompt) - parts.tail :]


def _over(parts: Parts, limits: Limits) -> str:
    """Which limits are broken and by what; empty if none is."""
    told = [("the row", parts.longest, limits.row), ("the prompt", len(parts.prompt), limits.prompt)]
    told += [(f"'{name}'", len(tokens), limits.answer) for name, tokens in parts.answers.items()]
    return ", ".join(
        f"{what} has {length} tokens of {limit}" for what, length, limit in told if limit is not None and length > limit
    )


def refuse_losses(limits: Limits, *, dropped: int, cut: int, records: int, longest: int, where: str) -> None:
    """Does nothing if few enough of the records were dropped or cut.

    Raises:
        DataError: otherwise, or if all were dropped; says how long the longest is.
    """
    lost, share = dropped + cut, limits.too_long.max_share
    if lost <= share * records and not (records and dropped == records):
        return
    what = "cut" if limits.cuts else "dropped"
    raise DataError(
        f"{lost} of {records} rows are too long and would be {what}, more than {share:.0%} (the longest has {longest} "
        f"tokens; the limit is {limits.row})",
        where=where,
        remedy="raise the stage's length limits, set too_long.do=cut, or raise too_long.max_share",
    )
