"""The stage kind ``sft``, as the rest of the package sees it; its trainer is in stages/shared/language_model.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated

from alignment.config.data import DataConfig, TooLongConfig, ValidationConfig
from alignment.config.model import AdapterConfig
from alignment.config.new_recipe import FIRST, Circumstances, NewStage, Question, Rows
from alignment.config.optim import OptimConfig
from alignment.config.rules import POSITIVE
from alignment.config.stage import not_identity, reference_to
from alignment.core.artifacts import POLICY
from alignment.core.fingerprint import IF_SET
from alignment.data.records import Conversation, LabelledAnswer, PreferencePair
from alignment.data.tokens.row_kinds import CONVERSATIONS
from alignment.stages.base import DataSlot, Display, Learning, LearnsFrom, Proposals, StageKind
from alignment.stages.shared import kind_answers as parts
from alignment.stages.shared.new_settings import (
    adapter_rate,
    data_of,
    epochs_of_answers,
    from_start,
    optimiser,
    row_limit,
    validation,
)


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning on conversations: only assistant turns are learned, including the end of each turn."""

    kind: str = "sft"
    init: str = reference_to("base", "policy")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-4))
    max_length: Annotated[int, POSITIVE] = 1024
    max_prompt_length: Annotated[int | None, POSITIVE] = None
    max_answer_length: Annotated[int | None, POSITIVE] = None
    too_long: TooLongConfig = field(default_factory=TooLongConfig)
    packing: bool = False
    validation: ValidationConfig = field(default_factory=ValidationConfig, metadata=IF_SET)
    log_every: Annotated[int, POSITIVE] = not_identity(1)
    save_every: Annotated[int, POSITIVE] = not_identity(10)


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


def _data(config: SftConfig) -> list[DataSlot]:
    own = DataSlot(field="data", data=config.data, record=Conversation, rows=CONVERSATIONS)
    return [own, parts.held_out_slot(config.validation, own)]


KIND = StageKind(
    name="sft",
    summary="instruction tuning on conversations",
    config=SftConfig,
    revision=11,
    produces=POLICY,
    run="alignment.stages.shared.language_model:learn_conversations",
    data=_data,
    metrics=parts.next_token_metrics,
    learning=Learning(limits=parts.limits_of_parts, may_drop=True, learns_from=LearnsFrom.demonstrations),
    display=Display(curves=parts.next_token_curves, lines=parts.handed_on, against_forgetting=parts.replay_advice),
    proposals=Proposals(questions=_questions, stage=_stage),
)
