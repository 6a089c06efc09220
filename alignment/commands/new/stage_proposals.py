"""Asks each kind of stage whether it belongs in the recipe, in the order of the registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from alignment.config.new_recipe import SCORER, Circumstances, NewStage, Question
from alignment.core.artifacts import POLICY
from alignment.core.errors import ConfigError
from alignment.stages.base import LearnsFrom, StageKind
from alignment.stages.registry import kinds


def questions(circumstances: Circumstances) -> list[Question]:
    """What the kinds have to know from the user, each question once."""
    raised = (question for kind in kinds().values() for question in kind.proposals.questions(circumstances))
    return list({question.name: question for question in raised}.values())


def proposed_stages(circumstances: Circumstances) -> dict[str, NewStage]:
    """The stages of the recipe, by the names of their kinds.

    Raises:
        ConfigError: no stage uses a file, or the scorer.
    """
    stages: dict[str, NewStage] = {}
    for kind in kinds().values():
        stage = kind.proposals.stage(circumstances)
        if stage is not None:
            stages[kind.name] = stage
            circumstances = _after(kind, circumstances)
    scorer = circumstances.answer(SCORER)
    if scorer and not any(scorer in repr(stage.settings) for stage in stages.values()):
        raise ConfigError(
            f"{scorer!r} has no effect: no stage scores answers",
            where=f"--{SCORER.name}",
            remedy="leave it out",
        )
    for files in _unused(circumstances, stages):
        raise ConfigError(
            f"no stage uses {files}",
            where="FILE",
            remedy="leave it out, choose stages that use it (--from-pairs, --scorer), or name it with --heldout",
        )
    return stages


def _after(kind: StageKind, circumstances: Circumstances) -> Circumstances:
    """The circumstances for kinds behind this one."""
    made: Mapping[str, list[str]] = {name: list(stages) for name, stages in circumstances.made.items()}
    made = {**made, kind.produces: [*made.get(kind.produces, []), kind.name]}
    begins = kind.produces == POLICY and kind.learning.learns_from in (None, LearnsFrom.demonstrations)
    return replace(circumstances, made=made, start=f"stage:{kind.name}" if begins else circumstances.start)


def _unused(circumstances: Circumstances, stages: Mapping[str, NewStage]) -> Iterator[str]:
    """The names of files that no stage reads."""
    read = [id(stage.reads) for stage in stages.values()]
    for rows in circumstances.rows.values():
        if id(rows) not in read:
            yield ", ".join(rows.files)
