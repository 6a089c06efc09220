"""A sweep's file: read, checked, and laid over the recipe that it is for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.config.did_you_mean import suggestion
from alignment.config.faults import Fault, refuse
from alignment.config.launch import LaunchConfig
from alignment.config.rules import NAME, is_name
from alignment.config.stage import StageConfig
from alignment.config.store import conf_folder
from alignment.config.sweep import ParameterConfig, Pruner, PruningConfig, Search, SweepConfig
from alignment.config.typed import sweep_from_plain
from alignment.core.errors import AlignmentError, ConfigError
from alignment.core.fingerprint import digest
from alignment.pipeline.backends import feasibility, slurm
from alignment.pipeline.plan.plan import Plan, make_plan
from alignment.pipeline.sweeps import objectives
from alignment.pipeline.sweeps.objectives import Objective
from alignment.stages.registry import kind_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep over a recipe, checked.

    ``identity`` stands for all that its trials' figures depend on; ``cautions`` are for whoever reads its outcome.
    """

    name: str
    config: SweepConfig
    recipe: str
    overrides: tuple[str, ...]
    run_name: str
    launch: LaunchConfig
    objectives: tuple[Objective, ...]
    identity: str
    folder: Path
    cautions: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The folder that holds the trials' runs."""
        return self.folder.parents[1]

    @property
    def number(self) -> int:
        """How many trials there are in all."""
        if self.config.search is Search.tpe:
            return self.config.trials or 0
        return math.prod(len(one.values) for one in self.config.parameters)


def read_sweep(recipe: str, name: str, overrides: Sequence[str]) -> Sweep:
    """A shipped sweep by its name, or a file's by its path, laid over the recipe.

    Raises:
        ConfigError: no such sweep, faults in it, keys that the recipe does not have, or no such objective.
    """
    path = Path(name) if name.endswith(".yaml") else conf_folder() / "sweep" / f"{name}.yaml"
    if not path.is_file():
        if "/" in name or name.endswith(".yaml"):
            raise ConfigError(f"no file {name}", where="SWEEP", remedy="a sweep of your own is a file in .yaml")
        known = sorted(one.stem for one in (conf_folder() / "sweep").glob("*.yaml"))
        raise ConfigError(f"no sweep {name!r}; {suggestion(name, known)}", where="SWEEP", remedy="or give a .yaml file")
    if not is_name(path.stem):
        raise ConfigError(f"{path.stem!r} cannot name a sweep; allowed: {NAME.allowed}", where=str(path))
    config = sweep_from_plain(_plain(path), where=str(path))
    refuse(_placed(path, _faults(config)))
    plan = _checked_plan(recipe, overrides, config.parameters, path)
    refuse(_placed(path, _faults_beside(config, plan.config.stages)))
    _refuse_unwatched(plan.config.launch, config.pruning)
    feasibility.refuse_what_cannot_start(
        plan.config.launch, plan.stages, num_devices=feasibility.devices_for(plan.config.launch)
    )
    found = objectives.resolve(config.objective, plan.config.stages)
    # The fingerprint of a stage covers recipe, overrides and data; what it does not reach changes no figure of it.
    judged = [stage.fingerprint for one in found for stage in plan.stages if stage.name == one.stage]
    return Sweep(
        name=path.stem,
        config=config,
        recipe=recipe,
        overrides=tuple(overrides),
        run_name=plan.config.name,
        launch=plan.config.launch,
        objectives=found,
        identity=digest([judged, config.search, config.seed, config.objective, config.parameters, config.pruning]),
        folder=plan.output / "sweeps" / f"{plan.config.name}.{path.stem}",
        cautions=objectives.cautions(found, plan.config.stages),
    )


def _checked_plan(recipe: str, overrides: Sequence[str], parameters: Sequence[ParameterConfig], path: Path) -> Plan:
    """The plan of the first values; each of the others is planned beside these, so that a wrong one is found now."""
    first = {one.key: _checked(one)[0] for one in parameters}
    others = [first | {one.key: value} for one in parameters for value in _checked(one)[1:]]
    try:
        plan = make_plan(recipe, [*overrides, *_words(first)])
        for values in others:
            make_plan(recipe, [*overrides, *_words(values)])
    except AlignmentError as error:
        make_plan(recipe, overrides)  # a fault of the recipe's own is told as such
        raise type(error)(error.message, where=f"{path}: {error.where}".rstrip(": "), remedy=error.remedy) from error
    return plan


def _checked(one: ParameterConfig) -> list[str]:
    """The values that a plan is made of before anything starts: all that are listed, or the ends of a range."""
    ends = [end for end in (one.low, one.high) if end is not None]
    return one.values or [str(int(end) if one.whole else end) for end in ends]


def _words(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _plain(path: Path) -> Any:
    """As YAML holds it; values of parameters as the text that an override would have, one objective as a list."""
    plain = yaml_file.read(path)
    if not isinstance(plain, dict):
        return plain
    if isinstance(plain.get("objective"), dict):
        plain["objective"] = [plain["objective"]]
    parameters = plain.get("parameters")
    for one in parameters if isinstance(parameters, list) else []:
        if isinstance(one, dict) and isinstance(one.get("values"), list):
            one["values"] = [value if isinstance(value, str) else json.dumps(value) for value in one["values"]]
    return plain


def _placed(path: Path, faults: Iterator[Fault]) -> list[Fault]:
    return [Fault(where=f"{path}: {fault.where}", message=fault.message) for fault in faults]


def _faults(config: SweepConfig) -> Iterator[Fault]:
    """What is wrong in the file, whatever the recipe."""
    if not config.parameters:
        yield Fault(where="parameters", message="nothing to try; write - {key: …, values: […]}")
    if config.search is Search.tpe and not config.trials:
        yield Fault(where="trials", message="say how many, such as trials: 12")
    if config.search is Search.grid and config.trials is not None:
        yield Fault(where="trials", message="a grid makes every combination; take this out, or take search: tpe")
    if config.pruning.pruner is not Pruner.none and len(config.objective) > 1:
        yield Fault(where="pruning.pruner", message="trials with several objectives are never pruned; take none")
    for number, one in enumerate(config.parameters):
        for message in _wrong_with(one, config.search):
            yield Fault(where=f"parameters[{number}]", message=message)
        if one.key and one.key in [other.key for other in config.parameters[:number]]:
            yield Fault(where=f"parameters[{number}]", message=f"{one.key} stands there twice; write all values in one")


def _wrong_with(one: ParameterConfig, search: Search) -> Iterator[str]:
    if not one.key:
        yield "which setting? write key: stages.dpo.beta"
    between = one.low is not None and one.high is not None and one.low < one.high
    if bool(one.values) == between:
        yield "write values: [...], or low and high with low below high"
    if not one.values and search is Search.grid:
        yield "a grid takes values; take search: tpe for low and high"
    if one.log and (one.low or 0) <= 0:
        yield "log wants low above 0"


def _faults_beside(config: SweepConfig, stages: Mapping[str, StageConfig]) -> Iterator[Fault]:
    """What does not fit these stages."""
    yield from objectives.faults(config.objective, stages)
    if config.pruning.pruner is not Pruner.none and (message := _unwatchable(config.pruning, stages)):
        yield Fault(where="pruning.stage", message=message)


def _unwatchable(pruning: PruningConfig, stages: Mapping[str, StageConfig]) -> str:
    trained = [name for name, stage in stages.items() if kind_of(stage).trains]
    return "" if pruning.stage in trained else f"no stage {pruning.stage!r} that learns; one of: {', '.join(trained)}"


def _refuse_unwatched(launch: LaunchConfig, pruning: PruningConfig) -> None:
    submission = slurm.submission(launch)
    if submission is None:
        return
    if not submission.wait:
        raise ConfigError(
            "a sweep waits for its trials' jobs", where="launch.backend.wait", remedy="leave it true, the default"
        )
    if pruning.pruner is not Pruner.none:
        raise ConfigError(
            "a trial whose stages are jobs of Slurm cannot be pruned: the jobs would go on",
            where="pruning.pruner",
            remedy="take none, or leave out launch/backend=slurm",
        )
