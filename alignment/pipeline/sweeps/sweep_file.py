"""Reads a sweep's file, checks it, and applies it to its recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.config.faults import Fault, refuse, suggestion
from alignment.config.launch import LaunchConfig
from alignment.config.rules import NAME, is_name
from alignment.config.run import conf_folder, sweep_names
from alignment.config.stage import StageConfig
from alignment.config.sweep import ParameterConfig, Pruner, PruningConfig, Search, SweepConfig
from alignment.config.typed import sweep_from_plain
from alignment.core.errors import AlignmentError, ConfigError
from alignment.core.fingerprint import digest
from alignment.data.source_files import similar_name
from alignment.pipeline.backends import feasibility, slurm
from alignment.pipeline.plan import settings
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.sweeps import objectives
from alignment.pipeline.sweeps.objectives import Objective
from alignment.records import training
from alignment.report import doubts
from alignment.stages.registry import kind_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep over a recipe, checked. ``plans`` has each value of the sweep's settings at least once. ``identity``
    covers everything that the trials' results depend on; ``profile`` is the name of the profile that was applied, if
    any; ``cautions`` are warnings for readers of the results."""

    name: str
    file: Path
    config: SweepConfig
    plans: tuple[Plan, ...]
    recipe: str
    overrides: tuple[str, ...]
    run_name: str
    launch: LaunchConfig
    objectives: tuple[Objective, ...]
    identity: str
    folder: Path
    profile: str = ""
    cautions: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The folder that holds the trials' runs."""
        return self.folder.parents[1]

    @property
    def number(self) -> int:
        """Total number of trials."""
        if self.config.search is Search.tpe:
            return self.config.trials or 0
        return math.prod(len(parameter.values) for parameter in self.config.parameters)


def read_sweep(recipe: str, name: str, overrides: Sequence[str]) -> Sweep:
    """A shipped sweep by its name, or a file by its path, applied to the recipe. Raises ConfigError: there is no such
    sweep, it has faults, the recipe lacks its keys, or no stage reports its objective."""
    path = _file_of(name)
    config = sweep_from_plain(_plain(path), where=str(path))
    refuse(_with_path(path, _faults(config)))
    plans = _checked_plans(recipe, overrides, config.parameters, path)
    for plan in plans:
        launch = plan.config.launch
        refuse(_with_path(path, _faults_beside(config, launch, plan.config.stages)))
        if (submission := slurm.submission(launch)) is not None and not submission.wait:
            message = "a sweep must wait for the jobs of its trials"
            raise ConfigError(message, where="launch.backend.wait", remedy="leave it true, the default")
        feasibility.refuse_what_cannot_start(launch, plan.stages, num_devices=feasibility.devices_for(launch))
    plan = plans[0]
    resolved = objectives.resolve(config.objective, plans)
    parameters = [parameter.key for parameter in config.parameters]
    judged = {objective.stage for objective in resolved}
    # The fingerprint of a stage covers recipe, overrides and data; nothing else changes its metrics. Every value has a
    # plan, because a value may name a file or another stage, whose content counts too.
    fingerprints = [[stage.fingerprint for stage in plan.stages if stage.name in judged] for plan in plans]
    tried = [config.search, config.seed, config.objective, config.parameters, config.pruning]
    without_effect = (fault for plan in plans for fault in plan.unread_settings if fault.where in parameters)
    return Sweep(
        name=path.stem,
        file=path,
        config=config,
        plans=tuple(plans),
        recipe=recipe,
        overrides=tuple(overrides),
        run_name=plan.config.name,
        launch=plan.config.launch,
        objectives=resolved,
        identity=digest([fingerprints, *tried]),
        folder=plan.output / "sweeps" / f"{plan.config.name}.{path.stem}",
        profile=plan.profile,
        cautions=(
            *([f"every trial is {doubts.SMOKE}"] if doubts.is_smoke(plan.profile) else []),
            *settings.unread_sentences(without_effect),
            *objectives.cautions(resolved, plan.config.stages),
        ),
    )


def _file_of(name: str) -> Path:
    is_path = "/" in name or name.endswith(".yaml")
    path = Path(name) if name.endswith(".yaml") else conf_folder() / "sweep" / f"{name}.yaml"
    if not path.is_file():
        similar = similar_name(path) if is_path else ""
        remedy = similar or "give the path of a .yaml file, or the name of a shipped sweep"
        message = "no such file" if is_path else f"no sweep of this name; {suggestion(name, sweep_names())}"
        raise ConfigError(message, where=name, remedy=remedy)
    if not is_name(path.stem):
        raise ConfigError(f"{path.stem!r} cannot name a sweep; allowed: {NAME.allowed}", where=str(path))
    return path


def _checked_plans(
    recipe: str, overrides: Sequence[str], parameters: Sequence[ParameterConfig], path: Path
) -> list[Plan]:
    """The plan for the first values, then one for each other value, so that an invalid one is found now."""
    first = {parameter.key: _checked(parameter)[0] for parameter in parameters}
    others = [first | {parameter.key: value} for parameter in parameters for value in _checked(parameter)[1:]]
    try:
        words = [[f"{key}={value}" for key, value in values.items()] for values in (first, *others)]
        return [make_plan(recipe, [*overrides, *of_plan]) for of_plan in words]
    except AlignmentError as error:
        make_plan(recipe, overrides)  # a fault of the recipe itself is reported without the sweep's path
        raise type(error)(error.message, where=f"{path}: {error.where}".rstrip(": "), remedy=error.remedy) from error


def _checked(parameter: ParameterConfig) -> list[str]:
    ends = [end for end in (parameter.low, parameter.high) if end is not None]
    return parameter.values or [str(int(end) if parameter.whole else end) for end in ends]


def _plain(path: Path) -> Any:
    """The file's content, with values of parameters as text, like in overrides, and a single objective as a list."""
    plain = yaml_file.read(path)
    if not isinstance(plain, dict):
        return plain
    if isinstance(plain.get("objective"), dict):
        plain["objective"] = [plain["objective"]]
    parameters = plain.get("parameters")
    for parameter in parameters if isinstance(parameters, list) else []:
        if isinstance(parameter, dict) and isinstance(parameter.get("values"), list):
            values = parameter["values"]
            parameter["values"] = [value if isinstance(value, str) else json.dumps(value) for value in values]
    return plain


def _with_path(path: Path, faults: Iterator[Fault]) -> list[Fault]:
    return [Fault(where=f"{path}: {fault.where}", message=fault.message) for fault in faults]


def _faults(config: SweepConfig) -> Iterator[Fault]:
    if not config.parameters:
        yield Fault(where="parameters", message="nothing to try; write - {key: …, values: […]}")
    if config.search is Search.tpe and not config.trials:
        yield Fault(where="trials", message="set the number of trials, such as trials: 12")
    if config.search is Search.grid and config.trials is not None:
        yield Fault(where="trials", message="a grid tries every combination; remove trials, or set search: tpe")
    if config.pruning.pruner is not Pruner.none and len(config.objective) > 1:
        yield Fault(where="pruning.pruner", message="trials with several objectives cannot be pruned; set it to none")
    for number, parameter in enumerate(config.parameters):
        low, high = parameter.low, parameter.high
        is_range = low is not None and high is not None and low < high
        is_double = parameter.key in [other.key for other in config.parameters[:number]]
        problems = {
            "no key; write key: stages.dpo.beta": not parameter.key,
            "write values: [...], or low and high with low below high": bool(parameter.values) == is_range,
            "a grid needs values; set search: tpe for low and high": not parameter.values
            and config.search is Search.grid,
            "log needs low above 0": parameter.log and (low or 0) <= 0,
            f"{parameter.key} is listed twice; write all its values in one entry": parameter.key and is_double,
        }
        for message in (message for message, is_there in problems.items() if is_there):
            yield Fault(where=f"parameters[{number}]", message=message)


def _faults_beside(config: SweepConfig, launch: LaunchConfig, stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    yield from objectives.faults(config.objective, stages)
    submission, prunes = slurm.submission(launch), config.pruning.pruner is not Pruner.none
    if submission is not None and prunes:
        why = "a trial whose stages are Slurm jobs cannot be pruned, because the jobs would continue"
        message = f"{why}; set it to none, or leave out launch/backend=slurm"
        yield Fault(where="pruning.pruner", message=message)
    trained = [name for name, stage in stages.items() if kind_of(stage).trains]
    if prunes and config.pruning.stage not in trained:
        message = f"no stage {config.pruning.stage!r} that trains; one of: {', '.join(trained)}"
        yield Fault(where="pruning.stage", message=message)
    elif prunes and (message := _unlogged(config.pruning, stages[config.pruning.stage])):
        yield Fault(where="pruning.metric", message=message)


def _unlogged(pruning: PruningConfig, stage: StageConfig) -> str:
    """Why a trial cannot be pruned by this figure of validation; other metrics are known once the stage logs its first
    step."""
    if not pruning.metric.startswith(training.PREFIX):
        return ""
    if missing := objectives.missing(stage, pruning.metric, pruning.stage):
        return missing
    if pruning.metric not in training.HELD_OUT:
        known = suggestion(pruning.metric, training.HELD_OUT)
        return f"stage {pruning.stage!r} reports {pruning.metric!r} only at its end; {known}"
    if pruning.minimize != objectives.less_is_better(pruning.metric):
        direction, value = ("more", "false") if pruning.minimize else ("less", "true")
        return f"the {direction} {pruning.metric}, the better; set pruning.minimize: {value}"
    return ""
