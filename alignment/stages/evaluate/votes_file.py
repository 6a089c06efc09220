"""Where the votes of an evaluation are, whether they can be read, and which command collects them.

Torch-free: the plan asks.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from alignment.config.evaluating import JudgeConfig, JudgeKind
from alignment.config.faults import Fault, unread_faults, unread_notes
from alignment.core.errors import DataError
from alignment.data.records import HeldOutPrompt
from alignment.evaluation.annotator_agreement import PACKAGE
from alignment.records.votes import FILE, read_votes
from alignment.stages.evaluate.config import EvaluateConfig

FIELD = "judge.votes"


def votes_files(config: EvaluateConfig, folder: Path) -> Mapping[str, Path]:
    """The file of votes, if people judge: the configured one, or that of ``align judge`` in ``folder`` if there is one.

    Raises:
        DataError: the configured file does not exist, or the file is damaged.
    """
    if config.judge.kind is not JudgeKind.people:
        return {}
    path = folder / FILE if config.judge.votes is None else Path(config.judge.votes).expanduser().absolute()
    if not path.is_file():
        if config.judge.votes is None:
            return {}
        raise DataError(
            f"no file {path}",
            where=f"stages.{folder.name}.{FIELD}",
            remedy="name a file of `align judge`, or leave it out to use the votes on this run",
        )
    read_votes(path)
    return {FIELD: path}


def vote_notes(config: EvaluateConfig, folder: Path) -> Iterator[str]:
    """A note if people judge and nobody has voted yet, with the command that collects votes."""
    if config.judge.kind is not JudgeKind.people or any(map(read_votes, votes_files(config, folder).values())):
        return
    yield (
        "nobody has voted yet, so there is no win rate; after the run, collect votes with "
        f"`{_command(config, folder)}`, and run the recipe again to count them"
    )


def _command(config: EvaluateConfig, folder: Path) -> str:
    """``align judge`` for the stage whose folder of the run is ``OUTPUT/runs/RUN/STAGE``."""
    run, output = folder.parent, folder.parents[2]
    words = ["align", "judge", run.name, "--stage", folder.name]
    if pairs := config.judge.pairs:
        words += ["--arm", pairs[0].arm, "--arm", pairs[0].against]
    elif len(config.arms) != 2:
        words += ["--arm", "ARM", "--arm", "ARM"]
    if config.judge.votes is not None:
        words += ["--votes", config.judge.votes]
    return shlex.join([*words, *([] if output == Path.cwd() else ["--output", str(output)])])


def single_answer_checks(config: EvaluateConfig) -> tuple[Callable[[HeldOutPrompt], object], ...]:
    """Raises DataError for a row of several turns if people judge: a vote is on one answer to one prompt."""
    return (_one_turn,) if config.judge.kind is JudgeKind.people else ()


def _one_turn(row: HeldOutPrompt) -> None:
    if row.later_turns:
        raise DataError(
            f"'turns' asks {row.num_turns} turns, but people judge single answers",
            where=row.where,
            remedy="choose another judge.kind, or leave out rows of several turns",
        )


def people_faults(judge: JudgeConfig, path: str) -> Iterator[Fault]:
    """Settings of a judge that has votes, or that could not count them; ``path`` is the judge's key."""
    if judge.kind is not JudgeKind.people:
        yield from unread_faults(judge, JudgeConfig(), ("votes",), path, "only judge.kind 'people'")
        return
    yield from unread_notes(judge, JudgeConfig(), ("max_prompts", "max_invalid"), path, "only another kind of judge")
    if importlib.util.find_spec("krippendorff") is None:
        message = f"'people' needs the package krippendorff, which is not installed; pip install '{PACKAGE}'"
        yield Fault(where=f"{path}.kind", message=message)
