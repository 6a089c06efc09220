"""Tries before the first stage what could stop a later one (alignment/rehearse.py), in a process with a deadline.

``align plan`` does not do this: it runs none of the user's code and needs no tokenizer. The stage that runs first is
left out, because it would fail at once anyway. So are Slurm jobs, whose nodes are not this machine.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignment import __version__
from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.config.launch import LauncherKind
from alignment.config.model import AdapterKind
from alignment.config.stage import StageConfig
from alignment.config.typed import to_plain
from alignment.core import hardware
from alignment.core.artifacts import POLICY
from alignment.core.errors import StageError
from alignment.core.files import write_text
from alignment.core.fingerprint import digest
from alignment.data.records import PlainText
from alignment.pipeline.backends import command, processes
from alignment.pipeline.backends.command import Command
from alignment.pipeline.backends.forking import ForkServer
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.plan import references, scorer_checks
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.stages.registry import as_trained, kind_of

FOLDER = ".tried"
REVISION = 5
"""Raised when a rehearsal checks more, so that older successes do not count."""
ROWS, SCORERS, MODEL = "rows", "scorers", "model"
_SETTINGS = {
    ROWS: (
        *("data", "max_answer_length", "max_length", "max_new_tokens", "max_prompt_length", "too_long", "validation"),
    ),
    SCORERS: ("data",),
    # The seed counts for nothing: the examples of an arm that it draws differ little in length.
    MODEL: (
        *("adapter", "answers", "arms", "critic", "data", "few_shot", "init", "limit", "max_new_tokens", "metrics"),
        *("num_fewshot", "policy", "reference", "sampling", "system_prompt", "tasks"),
    ),
}
"""The settings of a stage that a rehearsal of each part reads."""
_CONTENT = {
    ROWS: ("kind", "revision", "base", "data", "extra_data"),
    SCORERS: ("data", "code"),
    MODEL: ("kind", "revision", "base", "data", "extra_data", "files"),
}
"""The entries of an identity that cover the content that it reads."""


def _success(plan: Plan, stage: PlannedStage, part: str) -> Path:
    """The file that records that this part of the stage was rehearsed with success."""
    settings: dict[str, Any] = to_plain(stage.config)
    key = {
        "part": part,
        "version": [__version__, REVISION],
        "settings": {name: settings[name] for name in _SETTINGS[part] if name in settings},
        "content": {name: stage.identity[name] for name in _CONTENT[part] if name in stage.identity},
        "functions": list(stage.code) if part == SCORERS else [],
    }
    return plan.output / "artifacts" / FOLDER / digest(key)


_FOLDERS = ".rehearsal-"
_CHECKED = {ROWS: "rows of", SCORERS: "scorers of", MODEL: "requirements of"}
"""What is announced of the stages with each part."""
_RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""The trial is one process, so it must not wait for others."""


def rehearse(
    plan: Plan,
    stages: Sequence[PlannedStage],
    server: ForkServer | None = None,
    *,
    announce: Callable[[str], None],
) -> None:
    """Tries the stages that run after the first one, in a process that the ``server`` forks, if there is one. Raises
    AlignmentError: the error that a stage would raise: rows that cannot be learned from, a scorer that fails, or a base
    model that does not fit; StageError: no answer within ``launch.hang_seconds``."""
    waiting = [stage for stage in stages if stage.has_to_run][1:]
    waiting = [stage for stage in waiting if not stage.unmade]  # there is nothing to try yet
    has_part: dict[str, Callable[[StageConfig], object]] = {
        ROWS: lambda config: _learns_by_own_tokenizer(config, plan.config.stages),
        SCORERS: scorer_checks.functions,
        MODEL: lambda config: _has_model_check(config, plan.config.stages),
    }
    parts = {
        part: [stage for stage in waiting if has(stage.config) and not _success(plan, stage, part).is_file()]
        for part, has in has_part.items()
    }
    if not any(parts.values()):
        return
    named = " and ".join(
        f"{_CHECKED[part]} {', '.join(stage.name for stage in tried)}" for part, tried in parts.items() if tried
    )
    announce(f"checking {named} before training (takes ten seconds or more, once for these settings and data)")
    for note in _try(plan, parts, server):
        announce(note)
    with suppress(OSError):  # what cannot be recorded is tried again next time
        for file in (_success(plan, stage, part) for part, tried in parts.items() for stage in tried):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, "")


def _try(plan: Plan, parts: Mapping[str, Sequence[PlannedStage]], server: ForkServer | None) -> list[str]:
    plan.run_folder.mkdir(parents=True, exist_ok=True)
    for older in plan.run_folder.glob(f"{_FOLDERS}*"):
        shutil.rmtree(older, ignore_errors=True)
    # A folder of its own: the process of a killed driver may still write into the older one.
    folder = Path(tempfile.mkdtemp(prefix=_FOLDERS, dir=plan.run_folder))
    argv = [sys.executable, "-m", "alignment.rehearse", str(folder)]
    for part, stages in parts.items():
        argv.append(f"--{part}")
        for stage in stages:
            own = folder / stage.name
            path = worker_protocol.write_stage_file(plan, stage, plan.config.launch, git_commit="", folder=own)
            argv.append(str(path))
    code = processes.execute(
        Command(argv=tuple(argv), environment=_environment(plan)),
        log=folder / "log.txt",
        on_poll=_deadline(plan, parts[SCORERS]),
        grace_seconds=1.0,
        server=server,
    )
    kinds = [stage.config.kind for stages in parts.values() for stage in stages]
    worker_protocol.raise_for_status(folder, code=code, stage="rehearsal", kinds=kinds)
    notes = worker_protocol.notes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return notes


def _environment(plan: Plan) -> dict[str, str]:
    """A worker's environment, as far as a scorer may read it: a launcher of several processes sets the variables of
    the process's rank, and so does torchrun for one."""
    devices = hardware.count_devices()
    launch = command.with_processes(plan.config.launch, num_devices=devices)
    own = command.of_worker(hardware.count_cores(), os.environ.get("PYTHONPATH", ""))
    by_torchrun = command.chosen_launcher(launch, num_devices=devices) is LauncherKind.torchrun
    return own | _RANKS if by_torchrun or launch.num_processes > 1 else own


def _deadline(plan: Plan, scorers: Sequence[PlannedStage]) -> Callable[[], None]:
    started, limit = time.monotonic(), plan.config.launch.hang_seconds
    code = ", ".join(function for stage in scorers for function in stage.code)

    def on_poll() -> None:
        if limit and time.monotonic() - started > limit:
            raise StageError(
                f"checking rows{f' and {code}' if code else ''} before training did not finish within {limit} seconds",
                where="launch.hang_seconds",
                remedy="raise it, or set it to 0, if a scorer or template needs more time",
            )

    return on_poll


def _learns_by_own_tokenizer(config: StageConfig, stages: dict[str, StageConfig]) -> bool:
    trained = as_trained(config)
    if trained is None or not _is_of_base(trained.init, stages):
        return False
    return all(slot.record is not PlainText for slot in kind_of(config).data(config) if slot.field == "data")


def _has_model_check(config: StageConfig, stages: dict[str, StageConfig]) -> bool:
    """Whether the stage trains an adapter, or its kind has a check; one that reads the run's base model is left out if
    the stage has a policy that a stage of this run made from another model."""
    trained, kind = as_trained(config), kind_of(config)
    if kind.rehearse and not kind.rehearse_reads_base:
        return True
    has_adapter = trained is not None and trained.adapter.kind is not AdapterKind.full
    policies = [slot for slot in references.slots(config) if POLICY in slot.takes]
    of_stages = [slot.ref for slot in policies if references.stage_of(slot) is not None]
    return (has_adapter or bool(kind.rehearse)) and all(_is_of_base(ref, stages) for ref in of_stages)


def _is_of_base(ref: str, stages: dict[str, StageConfig]) -> bool:
    while (name := ref.removeprefix("stage:")) in stages:
        trained = as_trained(stages[name])
        if trained is None:
            return False
        ref = trained.init
    return ref in UNTRAINED_ARMS
