"""Remembers rehearsals that succeeded (alignment/pipeline/execute/rehearsal.py), so that none is repeated.

Each has a file in ``artifacts/.tried``, named by a hash of all that the rehearsal reads. Everything else may change:
rates, betas, what the stage starts from. So a continued run and the later trials of a sweep need not wait again.
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
REVISION = 5
"""Raised when a rehearsal checks more, so that older successes do not count."""
ROWS, SCORERS, MODEL = "rows", "scorers", "model"
_SETTINGS = {
    ROWS: (
        "data",
        "max_answer_length",
        "max_length",
        "max_new_tokens",
        "max_prompt_length",
        "too_long",
        "validation",
    ),
    SCORERS: ("data",),
    # The seed counts for nothing: the examples of an arm that it draws differ little in length.
    MODEL: (
        "adapter",
        "answers",
        "arms",
        "critic",
        "data",
        "few_shot",
        "init",
        "limit",
        "max_new_tokens",
        "metrics",
        "num_fewshot",
        "policy",
        "reference",
        "sampling",
        "system_prompt",
        "tasks",
    ),
}
"""The settings of a stage that a rehearsal of each part reads."""
_CONTENT = {
    ROWS: ("kind", "revision", "base", "data", "extra_data"),
    SCORERS: ("data", "code"),
    MODEL: ("kind", "revision", "base", "data", "extra_data", "files"),
}
"""The entries of an identity that cover the content that it reads."""


def is_known(plan: Plan, stage: PlannedStage, *, part: str) -> bool:
    """Whether this ``part`` of the stage, ``ROWS``, ``SCORERS`` or ``MODEL``, was rehearsed with success."""
    return _file(plan, stage, part).is_file()


def remember(plan: Plan, stage: PlannedStage, *, part: str) -> None:
    """Records a success; if that cannot be written, the part is tried again next time."""
    file = _file(plan, stage, part)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "")


def _file(plan: Plan, stage: PlannedStage, part: str) -> Path:
    settings: dict[str, Any] = to_plain(stage.config)
    key = {
        "part": part,
        "version": [__version__, REVISION],
        "settings": {name: settings[name] for name in _SETTINGS[part] if name in settings},
        "content": {name: stage.identity[name] for name in _CONTENT[part] if name in stage.identity},
        "functions": list(stage.code) if part == SCORERS else [],
    }
    return plan.output / "artifacts" / FOLDER / digest(key)
