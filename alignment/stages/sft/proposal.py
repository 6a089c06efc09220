"""Supervised fine-tuning in a recipe that `align new` writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from alignment.config.new_recipe import FIRST, Circumstances, NewStage, Question, Rows
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair
from alignment.stages.base import Proposals
from alignment.stages.shared.new_settings import (
    adapter_rate,
    data_of,
    epochs_of_answers,
    from_start,
    optimiser,
    row_limit,
    validation,
)


def _questions(circumstances: Circumstances) -> Iterator[Question]:
    if Conversation not in circumstances.rows and _better_answers(circumstances) and circumstances.has_template:
        yield FIRST


def _stage(circumstances: Circumstances) -> NewStage | None:
    rows = circumstances.rows.get(Conversation)
    why = "Learns the assistant's turns of the conversations."
    if rows is None and circumstances.answer(FIRST) != "skip":
        rows = _better_answers(circumstances)
        why = "Learns the better answers, so that the preference stage starts from a policy that gives such answers."
    if rows is None:
        return None
    sized = rows if rows is circumstances.rows.get(Conversation) else replace(rows, number=rows.prompts)
    epochs = epochs_of_answers(sized)
    settings = {
        **from_start(circumstances, "base"),
        **data_of(rows),
        **optimiser(sized, lr=adapter_rate(2e-4, "Dettmers et al. 2023, table 9, up to 13B"), epochs=epochs),
        **row_limit(rows, circumstances),
        **(validation(sized, epochs=epochs.value) if rows is not _labelled(circumstances) else {}),
    }
    return NewStage(why=why, settings=settings, reads=rows)


def _better_answers(circumstances: Circumstances) -> Rows | None:
    """Rows with answers that are better than others. They give one conversation a prompt, or less."""
    return circumstances.rows.get(PreferencePair) or _labelled(circumstances)


def _labelled(circumstances: Circumstances) -> Rows | None:
    """Rows of which only the good ones are learned, and nobody has counted those."""
    return circumstances.rows.get(LabelledAnswer)


PROPOSALS = Proposals(questions=_questions, stage=_stage)
