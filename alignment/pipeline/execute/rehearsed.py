"""Trials that went well (alignment/pipeline/execute/rehearsal.py) are remembered, so that the same is not tried twice.

A file for each in ``artifacts/.tried``, named by all that a trial looks at. What it does not look at may change: rates,
betas, what the stage starts from. So a run that goes on and the later trials of a sweep need not wait again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.config.typed import to_plain
from alignment.core.files import write_text
from alignment.core.fingerprint import digest
from alignment.pipeline.plan.plan import Plan, PlannedStage

FOLDER = ".tried"
ROWS, SCORERS = "rows", "scorers"
_SETTINGS = {
    ROWS: ("data", "max_length", "max_prompt_length", "max_answer_length", "too_long"),
    SCORERS: ("data",),
}
"""What a trial of this part reads of a stage's settings."""
_CONTENT = {ROWS: ("kind", "revision", "base", "data", "extra_data"), SCORERS: ("data", "code")}
"""Parts of an identity that stand for the content of what it reads."""


def is_known(plan: Plan, stage: PlannedStage, *, part: str) -> bool:
    """Whether the ``part`` of such a stage, ``ROWS`` or ``SCORERS``, was tried and went well."""
    return _file(plan, stage, part).is_file()


def remember(plan: Plan, stage: PlannedStage, *, part: str) -> None:
    """Notes that it went well; where that cannot be written, it is tried again."""
    file = _file(plan, stage, part)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "")


def _file(plan: Plan, stage: PlannedStage, part: str) -> Path:
    settings: dict[str, Any] = to_plain(stage.config)
    key = {
        "part": part,
        "version": __version__,
        "settings": {name: settings[name] for name in _SETTINGS[part] if name in settings},
        "content": {name: stage.identity[name] for name in _CONTENT[part] if name in stage.identity},
        "functions": list(stage.code) if part == SCORERS else [],
    }
    return plan.output / "artifacts" / FOLDER / digest(key)
