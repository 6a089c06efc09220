"""A sweep's file: read, checked, and laid over the recipe that it is for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignment.config.faults import Fault, refuse
from alignment.config.near import suggestion
from alignment.config.stage import EvaluateConfig
from alignment.config.store import conf_folder
from alignment.config.sweep import ParameterConfig, Search, SweepConfig
from alignment.config.typed import sweep_from_plain
from alignment.errors import ConfigError
from alignment.fingerprint import digest
from alignment.pipeline.plan import Plan, make_plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep over a recipe, checked. ``identity`` stands for all that its trials' figures depend on."""

    name: str
    config: SweepConfig
    recipe: str
    overrides: tuple[str, ...]
    run_name: str
    evaluation: str
    identity: str
    folder: Path

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
        known = sorted(one.stem for one in (conf_folder() / "sweep").glob("*.yaml"))
        raise ConfigError(f"no sweep {name!r}; {suggestion(name, known)}", where="SWEEP", remedy="or give a .yaml file")
    config = sweep_from_plain(_plain(path), where=str(path))
    refuse(list(_faults(config, where=str(path))))
    plan = _checked_plan(recipe, overrides, config.parameters)
    evaluation = _evaluation(plan, config, where=str(path))
    # An evaluation's fingerprint covers recipe, overrides and data; what it does not reach changes no figure.
    judged = next(stage.fingerprint for stage in plan.stages if stage.name == evaluation)
    return Sweep(
        name=path.stem,
        config=config,
        recipe=recipe,
        overrides=tuple(overrides),
        run_name=plan.config.name,
        evaluation=evaluation,
        identity=digest([judged, config.search, config.seed, config.objective, config.parameters]),
        folder=plan.output / "sweeps" / f"{plan.config.name}.{path.stem}",
    )


def _checked_plan(recipe: str, overrides: Sequence[str], parameters: Sequence[ParameterConfig]) -> Plan:
    """The plan of the first values; each of the others is planned beside these, so that a wrong one is found now."""
    first = {one.key: _first(one) for one in parameters}
    plan = make_plan(recipe, [*overrides, *_words(first)])
    for one in parameters:
        for value in one.values[1:]:
            make_plan(recipe, [*overrides, *_words(first | {one.key: value})])
    return plan


def _words(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _plain(path: Path) -> Any:
    """As YAML holds it; values of parameters as the text that an override would have."""
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not YAML: {error}", where=str(path)) from error
    for one in plain.get("parameters", []) if isinstance(plain, dict) else []:
        if isinstance(one, dict) and isinstance(one.get("values"), list):
            one["values"] = [value if isinstance(value, str) else json.dumps(value) for value in one["values"]]
    return plain


def _faults(config: SweepConfig, *, where: str) -> Iterator[Fault]:
    if not config.parameters:
        yield Fault(where=f"{where}: parameters", message="nothing to try; write - {key: …, values: […]}")
    if config.search is Search.tpe and not config.trials:
        yield Fault(where=f"{where}: trials", message="say how many, such as trials: 12")
    for number, one in enumerate(config.parameters):
        place = f"{where}: parameters[{number}]"
        if not one.key:
            yield Fault(where=place, message="which setting? write key: stages.dpo.beta")
        between = one.low is not None and one.high is not None and one.low < one.high
        if bool(one.values) == between:
            yield Fault(where=place, message="write values: [...], or low and high with low below high")
        if not one.values and config.search is Search.grid:
            yield Fault(where=place, message="a grid takes values; take search: tpe for low and high")
        if one.log and (one.low or 0) <= 0:
            yield Fault(where=place, message="log wants low above 0")


def _evaluation(plan: Plan, config: SweepConfig, *, where: str) -> str:
    """The stage that tells the objective."""
    found = {name: stage for name, stage in plan.config.stages.items() if isinstance(stage, EvaluateConfig)}
    arms = sorted({arm for stage in found.values() for arm in stage.arms})
    for name, stage in found.items():
        if config.objective.arm in stage.arms:
            return name
    raise ConfigError(
        f"no stage reports {config.objective.metric.value} of {config.objective.arm!r}",
        where=f"{where}: objective",
        remedy=f"arms of this recipe: {', '.join(arms)}" if arms else "add an evaluate stage to the recipe",
    )


def _first(one: ParameterConfig) -> str:
    if one.values:
        return one.values[0]
    return str(int(one.low or 0) if one.whole else one.low)
