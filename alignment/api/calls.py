"""``alignment.plan``, ``run`` and ``sweep``, and what every call from Python does around its work."""

from __future__ import annotations

import numbers
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alignment.api.loaded_run import Run, Sweep, data_frame, load_run, load_sweep
from alignment.config.typed import to_plain
from alignment.core.errors import PREEMPTED, AlignmentError, ConfigError, Preempted, StageError
from alignment.core.files import current_folder, explained
from alignment.core.terminal import Terminal
from alignment.costs.devices import THIS
from alignment.pipeline.backends.feasibility import why_not_here
from alignment.pipeline.execute import estimates, notes
from alignment.pipeline.execute.run import run_with_advice
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, termination_raises
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.pipeline.plan.row_counts import expected_steps
from alignment.records.cost import RunCost

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What happens to a stage: ``action`` is ``run``, ``resume``, ``reuse`` or ``fetch`` (the store has the result),
    and ``reason`` says why in words. ``fingerprint`` identifies the result (64 hexadecimal digits), ``artifact`` is its
    folder. ``inputs`` are references by the field that holds them. ``rows`` is the number of rows in the stage's own
    data, and ``steps`` that of optimiser steps, or of PPO's updates; None if only the stage will know. ``remarks`` say
    what the stage would read, run and choose, and what its gates require; each is the end of a sentence that begins
    with its name. ``settings`` are plain data."""

    name: str
    kind: str
    action: Action
    reason: str
    fingerprint: str
    artifact: Path
    inputs: dict[str, str]
    rows: int | None
    steps: int | None
    remarks: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RunPlan:
    """What a run would do, in the order of its stages. ``folder`` is where the run is recorded. ``notes`` are sentences
    about a plan that is valid but questionable. ``obstacle`` says why this machine cannot start it; empty if it can.
    ``cost`` is None where none was estimated."""

    name: str
    summary: str
    recipe: str
    overrides: tuple[str, ...]
    profile: str
    folder: Path
    stages: dict[str, StagePlan]
    notes: tuple[str, ...]
    obstacle: str
    settings: dict[str, Any]
    cost: RunCost | None = None

    @property
    def to_run(self) -> tuple[StagePlan, ...]:
        """The stages that would run or continue; the others are reused."""
        return tuple(stage for stage in self.stages.values() if stage.action in (Action.run, Action.resume))

    def frame(self) -> pandas.DataFrame:
        """A row for each stage: ``stage``, ``kind``, ``action``, ``reason`` and ``artifact``. Raises ConfigError:
        pandas is not installed."""
        columns = ("stage", "kind", "action", "reason", "artifact")
        rows = ((s.name, s.kind, s.action.value, s.reason, str(s.artifact)) for s in self.stages.values())
        return data_frame(columns, (dict(zip(columns, row, strict=True)) for row in rows))

    def __repr__(self) -> str:
        reused = len(self.stages) - len(self.to_run)
        lines = [f"{stage.name}: {stage.action.value} ({stage.reason})" for stage in self.stages.values()]
        return "\n  ".join([f"RunPlan {self.name}: {len(self.to_run)} to run, {reused} reused", *lines])


def described(plan: Plan, cost: RunCost | None) -> RunPlan:
    """The public record of a plan."""
    return RunPlan(
        name=plan.config.name,
        summary=plan.config.summary,
        recipe=plan.recipe,
        overrides=plan.overrides,
        profile=plan.profile,
        folder=plan.run_folder,
        stages={stage.name: _described(plan, stage) for stage in plan.stages},
        notes=tuple(notes.on_a_plan(plan)),
        obstacle=why_not_here(plan),
        settings=to_plain(plan.config),
        cost=cost,
    )


def _described(plan: Plan, stage: PlannedStage) -> StagePlan:
    references = {field: given.ref for field, given in stage.inputs.items()}
    own = stage.seen.get("data")
    return StagePlan(
        name=stage.name,
        kind=stage.config.kind,
        action=stage.action,
        reason=stage.reason,
        fingerprint=stage.fingerprint,
        artifact=stage.artifact,
        inputs=references | {f"arms[{number}]": arm.ref for number, arm in enumerate(stage.arms.values())},
        rows=own.rows if own is not None and own.whole else None,
        steps=expected_steps(stage.config, stage.seen),
        remarks=tuple(notes.of_stage(plan, stage)),
        settings=to_plain(stage.config),
    )


Recipe = str | os.PathLike[str]
"""The name of a shipped file, or the path of a .yaml file."""


def name_of(file: Recipe, argument: str = "recipe") -> str:
    """The name or the path that a caller gave as ``argument``. Raises TypeError: it is something else, such as the
    settings themselves."""
    if isinstance(file, str):
        return file
    if isinstance(file, os.PathLike):
        return str(os.fspath(file))
    raise TypeError(
        f"{argument} is a {type(file).__name__}; it must be the name of a shipped {argument} or the path of a .yaml "
        "file. Settings are the overrides of a recipe, such as alignment.plan('quickstart', {'stages.dpo.beta': 0.3}); "
        "to use settings of your own alone, write them to a file with yaml.safe_dump and give its path"
    )


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turns errors of the file system into public errors, as the command does, and names arguments as Python does:
    ``at_once`` and not ``--at-once``."""
    try:
        with explained(current_folder()):
            yield
    except AlignmentError as error:
        if error.where.startswith("--"):
            error.where = error.where.removeprefix("--").replace("-", "_")
        raise


def console_of(*, quiet: bool) -> Console:
    """Standard output: a live line on a terminal, else plain lines. A kernel of Jupyter sets ``FORCE_COLOR``, so that
    rich would move the cursor in a notebook's output."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Terminal(soft_wrap=False, quiet=quiet, force_jupyter=False, force_terminal=is_terminal)


def raise_if_stopped(code: int, name: str) -> None:
    """Raises what stands for the exit code of a call that was stopped.

    Raises:
        KeyboardInterrupt: it was interrupted.
        Preempted: it was asked to stop otherwise."""
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == PREEMPTED:
        raise Preempted("was asked to stop and has saved", where=name, remedy="repeat the call to continue from there")


Value = None | bool | int | float | str | os.PathLike[str] | Sequence["Value"] | Mapping[str, "Value"]
Overrides = Sequence[str] | Mapping[str, Value]

_PLAIN = re.compile(r"[A-Za-z_][\w./:@-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NOT_TEXT = ("true", "false", "null", "nan", "inf")
_BEFORE_A_QUOTE = re.compile(r"(\\*)('|$)")


def words(overrides: Overrides) -> list[str]:
    """Overrides as they are typed on the command line.

    Raises:
        TypeError: they are neither texts nor a mapping.
        ConfigError: they are one text instead of several, or a value cannot be written in a configuration."""
    if isinstance(overrides, str):
        remedy = f"give a list [{overrides!r}], or a mapping"
        raise ConfigError(f"{overrides!r} is a single string", where="overrides", remedy=remedy)
    if isinstance(overrides, Mapping):
        return [f"{key}={_written(value, key)}" for key, value in overrides.items()]
    given = list(overrides) if isinstance(overrides, Iterable) else [overrides]
    if wrong := [item for item in given if not isinstance(item, str)]:
        raise TypeError(
            f"{wrong[0]!r} is not an override; give texts, as in ['stages.dpo.beta=0.3'], or a mapping, as in "
            "{'stages.dpo.beta': 0.3}"
        )
    return given


def _written(value: object, key: str) -> str:
    """A value in Hydra's grammar, such that it is read as the same value."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case numbers.Integral():
            return str(int(value))
        case numbers.Real():
            return repr(float(value))
        case str() | os.PathLike():
            return _text(os.fspath(value))
        case Mapping():
            return "{" + ", ".join(f"{_name(name, key)}: {_written(item, key)}" for name, item in value.items()) + "}"
        case Sequence() if not isinstance(value, bytes):
            return "[" + ", ".join(_written(item, key) for item in value) + "]"
    remedy = "give None, a bool, a number, a string, a path, or a list or mapping of these"
    raise ConfigError(f"{type(value).__name__} cannot be written in a configuration", where=key, remedy=remedy)


def _name(name: object, key: str) -> str:
    """The name of a setting in a group, which Hydra does not take in quotes."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    raise ConfigError(f"{name!r} cannot name a setting", where=key, remedy="use letters, digits and _")


def _text(text: str) -> str:
    """Text that needs no quotes, or text in quotes. Hydra halves only the backslashes before a quote."""
    if _PLAIN.fullmatch(text) and text.lower() not in _NOT_TEXT:
        return text
    escaped = _BEFORE_A_QUOTE.sub(lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{escaped}'"


def plan(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    cost: bool = False,
    trade: bool = False,
    device: str = THIS,
    verify: bool = False,
    quiet: bool = False,
) -> RunPlan:
    """What ``run`` would do, and why; trains nothing. The command is ``align plan``.

    ``recipe`` is the name of a shipped recipe, or the path of a .yaml file. ``overrides`` are texts
    (``"stages.dpo.beta=0.3"``) or a mapping (``{"stages.dpo.beta": 0.3}``). With ``cost`` or another ``device``,
    the plan says what the stages would need on ``device``, and with ``trade``, what every way of training them would
    need; that takes ten seconds or more for each stage. Otherwise it has the cost that was estimated before, if any.
    With ``verify``, results to reuse are read and compared with their hashes; without, their sizes are compared.

    Raises:
        ConfigError, DataError, ModelError: a fault in the recipe, the overrides, a data file or a model.
        ArtifactError: a manifest cannot be read, or an artifact of a folder that the recipe names is damaged.
        StageError: the cost cannot be estimated.
        Preempted: a signal asked for a stop while the cost was estimated."""
    cost = estimates.is_wanted(cost=cost, device=device)
    with errors_explained():
        checked = estimates.checked_plan(
            name_of(recipe), words(overrides), cost=cost, trade=trade, device=device, verified=verify
        )
        if not (cost or trade):
            return described(checked, estimates.known_costs(checked))
        console = console_of(quiet=quiet)
        try:
            with termination_raises():
                estimated = estimates.estimated(checked, device=device, trade=trade, announce=console.print)
        except Terminated as stop:
            raise Preempted("the estimate was asked to stop", where=checked.config.name) from stop
        return described(checked, estimated)


def run(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    stage: str | None = None,
    wait: bool = False,
    verify: bool = False,
    quiet: bool = False,
) -> Run:
    """Plans a recipe, runs what has to run, and returns the run. The command is ``align run``.

    ``recipe``, ``overrides`` and ``verify`` are those of ``plan``. ``stage`` names the only stage to run, from results
    of earlier ones. With ``wait``, a result that another process works on is waited for. Progress is printed to
    standard output unless ``quiet``.

    Raises:
        AlignmentError: as for ``plan``; and StageError, DiskError, NonFiniteError, RewardError if a stage fails; Busy
            if another process works on the run; GateNotMet if the results do not meet a gate. Finished results stay.
        KeyboardInterrupt: Ctrl-C, or the interrupted kernel of a notebook; the stage has saved.
        Preempted: another signal asked the run to stop; the stage has saved."""
    with errors_explained():
        planned = make_plan(name_of(recipe), words(overrides), verified=verify)
        code = run_with_advice(planned, console=console_of(quiet=quiet), only=stage, wait=wait)
        raise_if_stopped(code, planned.config.name)
        return load_run(planned.run_folder)


def sweep(
    recipe: Recipe,
    sweep: Recipe,
    overrides: Overrides = (),
    *,
    at_once: int = 1,
    retry_failed: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Runs the missing trials of a sweep, and those that failed if ``retry_failed``, and returns all. The command is
    ``align sweep``.

    ``sweep`` is the name of a shipped sweep, or the path of a .yaml file. ``overrides`` hold for every trial.
    ``at_once`` trials run at the same time, each with its share of the machine.

    Raises:
        AlignmentError: as for ``plan``; ConfigError if the sweep does not fit the recipe or the machine, or optuna is
            not installed; Busy if another process works on it; StageError if no trial has ever finished.
        KeyboardInterrupt, Preempted: as for ``run``; the same call continues with the missing trials."""
    from alignment.pipeline.sweeps.run import run_sweep  # optuna, which a plan does without
    from alignment.pipeline.sweeps.sweep_file import read_sweep

    with errors_explained():
        checked = read_sweep(name_of(recipe), name_of(sweep, "sweep"), words(overrides))
        code = run_sweep(checked, console=console_of(quiet=quiet), at_once=at_once, retry_failed=retry_failed)
        raise_if_stopped(code, checked.folder.name)
        if code:
            remedy = "load_sweep says why each trial failed"
            raise StageError("no trial has finished", where=str(checked.folder), remedy=remedy)
        return load_sweep(checked.folder)
