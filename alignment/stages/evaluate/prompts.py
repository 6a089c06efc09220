"""The prompts of an evaluation: which are held out, with which examples, turn by turn, for each arm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.core.errors import DataError, ModelError
from alignment.core.model_files import positions_in, reason_of_positions
from alignment.core.wording import counted
from alignment.data.records import Conversation, HeldOutPrompt
from alignment.data.tokens.rendering import Tools
from alignment.data.tokens.thoughts import without_thought
from alignment.data.tokens.tokenize import answer_ids, prompt_ids, tokenize_rows
from alignment.data.tokens.tokenizer import load_tokenizer, tokenizer_hashes
from alignment.data.turns import Message
from alignment.evaluation.arms import Answer, Answered, TokenSum, grouped
from alignment.evaluation.exchanges import (
    asked_turns,
    continued,
    draw_examples,
    letter_rows,
    with_examples,
    with_system_prompt,
)
from alignment.job import StageInput
from alignment.models.assembly.load import Lineage, lineage
from alignment.rewards.scorer_sources import CHOICE
from alignment.stages.evaluate.kind import EvaluateConfig
from alignment.stages.shared.base_check import refuse_base_that_cannot_answer
from alignment.stages.shared.policies import refuse_without_template, tokenizer_of
from alignment.stages.shared.stage_rows import list_left_out, rows_of
from alignment.training.context import StageContext


def held_out_prompts(config: EvaluateConfig, context: StageContext) -> list[HeldOutPrompt]:
    """The first row of each prompt; ``left_out.jsonl`` lists the others, and a note counts them."""
    rows = rows_of(context, HeldOutPrompt, config.data)
    first: dict[str, HeldOutPrompt] = {}
    for row in rows:
        first.setdefault(_asked(row), row)
    repeats = [(row, earlier) for row in rows if (earlier := first[_asked(row)]) is not row]
    list_left_out(
        context,
        ({"where": row.where, "reason": f"its prompt repeats that of {earlier.where}"} for row, earlier in repeats),
    )
    if repeats and context.is_main:
        context.notes.append(
            f"of {counted(len(rows), 'held-out row')}, {len(repeats):,} that ask what an earlier row asks are left "
            "out: each prompt counts once"
        )
    return list(first.values())


def _asked(row: HeldOutPrompt) -> str:
    """All that an arm reads of a row."""
    turns = [turn.as_dict() for turn in row.messages]
    return json.dumps([turns, row.tools, row.later_turns, row.choices], sort_keys=True, default=str)


Shown = Callable[[HeldOutPrompt], Sequence[Message]]
"""The messages that an arm is asked with, such as the row's behind a system prompt."""


def unchanged(row: HeldOutPrompt) -> Sequence[Message]:
    return row.messages


def shown_otherwise(config: EvaluateConfig, context: StageContext, rows: Sequence[HeldOutPrompt]) -> dict[str, Shown]:
    """How the arms are asked that get more than a row's own messages, by name."""
    system_prompt = config.system_prompt or ""  # the plan refuses an arm that needs one without it
    shown: dict[str, Shown] = {PROMPTED: lambda row: with_system_prompt(row.messages, system_prompt)}
    if FEW_SHOT in config.arms:
        examples = draw_examples(
            rows_of(context, Conversation, config.few_shot.data, field="few_shot.data"),
            rows,
            count=config.few_shot.count,
            generator=context.generator("few_shot"),
            where=f"stages.{context.spec.stage}.few_shot",
        )
        shown[FEW_SHOT] = lambda row: with_examples(row.messages, examples)
    return shown


def reference_ids(tokenizer: Any, messages: Sequence[Message], reference: str, tools: Tools) -> list[int]:
    """A reference in tokens; without its thought if that cannot follow the prompt (``enable_thinking: false``)."""
    try:
        return answer_ids(tokenizer, messages, reference, tools)
    except DataError:
        answer = without_thought(Message(role="assistant", content=reference)).content
        if answer in ("", reference):
            raise
        return answer_ids(tokenizer, messages, answer, tools)


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
    """What an arm is asked in turn ``number`` (from 0). ``rows`` are the indices of the rows that have this turn.
    ``prompts`` are one per row in the first turn, and all answers to a row share it. In later turns they are one per
    answer, because each answer continues its own conversation. ``references`` are one per row, None for a row without a
    reference answer."""

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
    """The prompts of the rows, and their references if asked for."""

    def reference(row: HeldOutPrompt) -> Reference | None:
        text = row.reference
        return Reference(ids=reference_ids(tokenizer, shown(row), text, row.tools)) if text else None

    return TurnPrompts(
        number=0,
        rows=list(range(len(rows))),
        prompts=tokenize_rows(rows, lambda row: prompt_ids(tokenizer, shown(row), row.tools)),
        references=tokenize_rows(rows, reference) if with_references else [None] * len(rows),
    )


def later_turn(
    arm: ArmPrompts, rows: Sequence[HeldOutPrompt], earlier: Sequence[Sequence[Sequence[str]]], *, number: int
) -> TurnPrompts:
    """Turn ``number`` of every row that has it; ``earlier`` are each row's samples: the answers given before. A
    reference answer follows the references of the turns before it, which makes it the same text for all arms."""
    tokenizer, shown = arm.tokenizer, arm.shown
    asked = rows_with(rows, number)

    def reference(row: HeldOutPrompt) -> Reference | None:
        *before, last = row.references[: number + 1]
        if not (last and all(before)):
            return None
        messages = shown(continued(row, before))
        return Reference(
            ids=reference_ids(tokenizer, messages, last, row.tools), prompt=prompt_ids(tokenizer, messages, row.tools)
        )

    prompts = [continued(rows[index], answers) for index in asked for answers in earlier[index]]
    return TurnPrompts(
        number=number,
        rows=asked,
        prompts=tokenize_rows(prompts, lambda prompt: prompt_ids(tokenizer, shown(prompt), prompt.tools)),
        references=[None] * len(asked) if arm.own_tokens else tokenize_rows([rows[i] for i in asked], reference),
    )


def rows_with(rows: Sequence[HeldOutPrompt], number: int) -> list[int]:
    """The indices of the rows that have turn ``number``."""
    return [index for index, row in enumerate(rows) if row.num_turns > number]


def conversations(rows: Sequence[HeldOutPrompt], turns: Sequence[Answered], per_prompt: int) -> list[list[list[str]]]:
    """Each row's samples: the answers given in the turns so far, of which each entry has the rows that have it."""
    samples: list[list[list[str]]] = [[[] for _ in range(per_prompt)] for _ in rows]
    for number, turn in enumerate(turns):
        for row, answers in zip(rows_with(rows, number), grouped(turn.answers, per_prompt), strict=True):
            for sample, answer in zip(samples[row], answers, strict=True):
                sample.append(answer.text)
    return samples


def together(rows: Sequence[HeldOutPrompt], turns: Sequence[Answered]) -> Answered:
    """The turns of an arm (``conversations``) in the order of ``Answered``: by row, then turn, then answer."""
    per_prompt = turns[0].per_prompt
    index_of = [{row: index for index, row in enumerate(rows_with(rows, number))} for number in range(len(turns))]
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmPrompts:
    """The prompts of an arm, in its own tokens: those of the ``first`` turn, and how it is ``shown`` any row.
    ``own_tokens``: the arm has its own tokenizer, so figures that depend on tokens cannot be compared with other arms.
    ``plain``: its prompts are the held-out prompts, unchanged, so its answers can be compared with the reference's."""

    policy: Lineage
    tokenizer: Any
    first: TurnPrompts
    shown: Shown
    plain: bool
    own_tokens: bool


def prompts_of_arms(
    config: EvaluateConfig, context: StageContext, tokenizer: Any, rows: Sequence[HeldOutPrompt]
) -> dict[str, ArmPrompts]:
    otherwise, arms = shown_otherwise(config, context, rows), context.spec.arms
    return {name: _arm_prompts(context, arms[name], tokenizer, rows, otherwise.get(name)) for name in config.arms}


def _arm_prompts(
    context: StageContext, stage_input: StageInput, ours: Any, rows: Sequence[HeldOutPrompt], shown: Shown | None
) -> ArmPrompts:
    tokenizer = tokenizer_of(context, stage_input, ours)
    own_tokens = tokenizer is not ours and tokenizer_hashes(tokenizer) != tokenizer_hashes(ours)
    if own_tokens:
        refuse_without_template(context, stage_input, tokenizer)
    return ArmPrompts(
        policy=lineage(context.spec, stage_input),
        tokenizer=tokenizer,
        first=first_turn(tokenizer, rows, shown or unchanged, with_references=not own_tokens),
        shown=shown or unchanged,
        plain=shown is None,
        own_tokens=own_tokens,
    )


def _refuse_long_prompts(config: EvaluateConfig, context: StageContext) -> None:
    """Checks every arm that has the base model's tokenizer and positions: the first prompts with an answer to them, and
    what is scored after a prompt. Later prompts contain answers, and models from outside have positions of their own;
    both are checked when they are asked (answering.py)."""
    spec = context.spec
    positions = positions_in(spec.base_path)
    if positions is None:
        return
    tokenizer = load_tokenizer(spec.base_path, spec.model.template)
    rows = rows_of(context, HeldOutPrompt, config.data)
    otherwise = shown_otherwise(config, context, rows)
    arms = [name for name in config.arms if spec.arms[name].is_of_run]
    by_prompt = {otherwise.get(name, unchanged): name for name in reversed(arms)}  # most arms have the same prompts
    for shown, arm in by_prompt.items():
        for text, lengths in _read_texts(config, tokenizer, rows, shown):
            longest = max(range(len(rows)), key=lengths.__getitem__)
            if lengths[longest] <= positions:
                continue
            number, where = sum(length > positions for length in lengths), f"stages.{spec.stage}"
            lower = [f"{where}.few_shot.count"] if arm == FEW_SHOT else []
            if text.startswith("an answer"):
                lower.insert(0, f"{where}.max_new_tokens")
            raise ModelError(
                f"with its prompt and {text.format(lengths[longest])} together, the arm {arm!r} needs more than "
                f"the {positions} positions of {spec.model.source}{reason_of_positions(spec.base_path)}; {number} of "
                f"{len(rows)} rows are too long",
                where=rows[longest].where,
                remedy="leave out rows that are too long" + (f", or lower {' or '.join(lower)}" if lower else ""),
            )


def _read_texts(
    config: EvaluateConfig, tokenizer: Any, rows: Sequence[HeldOutPrompt], shown: Shown
) -> Iterator[tuple[str, list[int]]]:
    """What a policy writes or scores after a prompt, in words for its tokens, and the tokens of each row to its end."""
    tokens = tokenize_rows(rows, lambda row: [len(prompt_ids(tokenizer, shown(row), row.tools))])
    most = config.max_new_tokens
    yield f"an answer of up to {most} tokens, {{}}", [length + most for (length,) in tokens]
    after = tokenize_rows(rows, lambda row: _tokens_with_reference(tokenizer, row, shown))
    yield "its reference answer of {} tokens", after
    if any(metric.source == CHOICE for metric in config.metrics):
        yield "its choices of {} tokens", letter_rows(tokenizer, rows, shown).lengths


def _tokens_with_reference(tokenizer: Any, row: HeldOutPrompt, shown: Shown) -> int:
    """The tokens of the longest conversation that ends with a reference answer; 0 without one. A reference answer
    follows those of the turns before."""
    references, longest = list(takewhile(bool, row.references)), 0
    for number, reference in enumerate(references):
        messages = shown(continued(row, references[:number]))
        ids = reference_ids(tokenizer, messages, reference, row.tools)
        longest = max(longest, len(prompt_ids(tokenizer, messages, row.tools)) + len(ids))
    return longest


def refuse_base(config: EvaluateConfig, context: StageContext) -> None:
    """Checks the base model of the arms, and the first turn of every arm.

    Raises:
        ModelError: a prompt and its answer may be longer than the base model's positions, it cannot be sampled from, or
            its head does more than one matrix product.
        DataError: a row cannot be read or rendered, or there are too few examples."""
    _refuse_long_prompts(config, context)
    spec = context.spec
    arms = [name for name in config.arms if spec.arms[name].is_of_run]
    if arms:
        refuse_base_that_cannot_answer(spec, config.sampling, scored=_are_scored(arms, config, context))


def _are_scored(arms: Sequence[str], config: EvaluateConfig, context: StageContext) -> bool:
    """Whether log-probabilities are asked for, as in run.py: of the answers of arms that are compared with the
    reference, of choices, or of reference answers."""
    spec = context.spec
    others = {name for name in arms if spec.arms[name].path != spec.inputs["reference"].path}
    if others - {FEW_SHOT, PROMPTED} and config.answers.temperature in (0.0, 1.0):
        return True
    if any(metric.source == CHOICE for metric in config.metrics):
        return True
    return any(row.reference for row in rows_of(context, HeldOutPrompt, config.data))
