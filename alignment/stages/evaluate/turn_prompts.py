"""What an arm is asked in each turn, in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.records import HeldOutPrompt
from alignment.data.tokens.tokenize import prompt_ids, tokenize_rows
from alignment.evaluation.arms import Answer, Answered, TokenSum
from alignment.evaluation.exchanges import asked_turns, continued
from alignment.stages.evaluate.shown_prompts import Shown, reference_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A reference answer in tokens. It follows ``prompt``, or the row's own prompt if that is None."""

    ids: list[int]
    prompt: list[int] | None = None

    @property
    def key(self) -> list[Any]:
        """Everything that its log-probability depends on besides the row's own prompt."""
        return self.ids if self.prompt is None else [self.prompt, self.ids]


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnPrompts:
    """What an arm is asked in turn ``number`` (from 0).

    ``rows`` are the indices of the rows that have this turn. ``prompts`` are one per row in the first turn, and all
    answers to a row share it. In later turns they are one per answer, because each answer continues its own
    conversation. ``references`` are one per row, None for a row without a reference answer.
    """

    number: int
    rows: list[int]
    prompts: list[list[int]]
    references: list[Reference | None]

    @property
    def tokens_with_references(self) -> list[int]:
        """The tokens of each row's reference answer and of the prompt that it follows; 0 without one."""
        return [
            0
            if reference is None
            else len(self.prompts[index] if reference.prompt is None else reference.prompt) + len(reference.ids)
            for index, reference in enumerate(self.references)
        ]


def first_turn(tokenizer: Any, rows: Sequence[HeldOutPrompt], shown: Shown, *, with_references: bool) -> TurnPrompts:
    """The prompts of the rows, and their references if asked for.

    Raises:
        DataError: a row cannot be rendered.
    """

    def reference(row: HeldOutPrompt) -> Reference | None:
        if not row.reference:
            return None
        return Reference(ids=reference_ids(tokenizer, shown(row), row.reference, row.tools))

    return TurnPrompts(
        number=0,
        rows=list(range(len(rows))),
        prompts=tokenize_rows(rows, lambda row: prompt_ids(tokenizer, shown(row), row.tools)),
        references=tokenize_rows(rows, reference) if with_references else [None] * len(rows),
    )


def later_turn(
    tokenizer: Any,
    rows: Sequence[HeldOutPrompt],
    shown: Shown,
    earlier: Sequence[Sequence[Sequence[str]]],
    *,
    number: int,
    with_references: bool,
) -> TurnPrompts:
    """Turn ``number`` of every row that has it; ``earlier`` are each row's samples: the answers given before.

    A reference answer follows the references of the turns before it, which makes it the same text for all arms.

    Raises:
        DataError: a row cannot be rendered with these answers.
    """
    asked = [index for index, row in enumerate(rows) if row.num_turns > number]

    def reference(row: HeldOutPrompt) -> Reference | None:
        *before, last = row.references[: number + 1]
        if not (last and all(before)):
            return None
        messages = shown(continued(row, before))
        return Reference(
            ids=reference_ids(tokenizer, messages, last, row.tools),
            prompt=prompt_ids(tokenizer, messages, row.tools),
        )

    prompts = [continued(rows[index], answers) for index in asked for answers in earlier[index]]
    return TurnPrompts(
        number=number,
        rows=asked,
        prompts=tokenize_rows(prompts, lambda prompt: prompt_ids(tokenizer, shown(prompt), prompt.tools)),
        references=tokenize_rows([rows[index] for index in asked], reference)
        if with_references
        else [None] * len(asked),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredTurn:
    """An arm's answers in one turn: ``per_prompt`` for each of ``rows``. The other fields are those of ``Answered``."""

    rows: list[int]
    answers: list[Answer]
    logprobs: list[float] | None
    references: list[TokenSum | None]
    seconds: float


def conversations(
    rows: Sequence[HeldOutPrompt], turns: Sequence[AnsweredTurn], per_prompt: int
) -> list[list[list[str]]]:
    """Each row's samples: the answers given in the turns so far."""
    samples: list[list[list[str]]] = [[[] for _ in range(per_prompt)] for _ in rows]
    for turn in turns:
        for number, answer in enumerate(turn.answers):
            samples[turn.rows[number // per_prompt]][number % per_prompt].append(answer.text)
    return samples


def together(rows: Sequence[HeldOutPrompt], turns: Sequence[AnsweredTurn], per_prompt: int) -> Answered:
    """The turns of an arm in the order of ``Answered``: by row, then turn, then answer."""
    index_of = [{row: index for index, row in enumerate(turn.rows)} for turn in turns]
    answers: list[Answer] = []
    logprobs: list[float] = []
    references: list[TokenSum | None] = []
    for asked in asked_turns(rows):
        turn, index = turns[asked.turn], index_of[asked.turn][asked.row]
        of_row = slice(index * per_prompt, (index + 1) * per_prompt)
        answers += turn.answers[of_row]
        logprobs += (turn.logprobs or [])[of_row]
        references.append(turn.references[index])
    return Answered(
        answers=answers,
        logprobs=None if turns[0].logprobs is None else logprobs,
        references=references,
        seconds=sum(turn.seconds for turn in turns),
        per_prompt=per_prompt,
        turns=[row.num_turns for row in rows],
    )
