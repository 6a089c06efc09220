"""The table of all stage kinds: the built-in ones, and those that other packages add.

A package adds a kind with an entry point in the group ``alignment.stages``: ``toy = "my_package.toy:KIND"``.
A kind that cannot be loaded is listed by ``problems()``; it stops only a run that uses it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

from alignment.config.faults import suggestion
from alignment.config.launch import Offload, Sharding
from alignment.config.model import Dtype, ModelConfig
from alignment.config.run import TrackingConfig
from alignment.config.stage import StageClasses, StageConfig, TrainedConfig
from alignment.config.typed import stage_from_plain
from alignment.core.artifacts import read_manifest
from alignment.core.errors import AlignmentError, ConfigError
from alignment.data.tokens.row_kinds import Kind as RowKind
from alignment.data.tokens.row_kinds import Limits
from alignment.job import StageInput, StageSpec
from alignment.rewards.scorer_sources import REWARD, is_reference
from alignment.stages import kind_problems
from alignment.stages.base import LOSS, Curve, LearnsFrom, ResultTable, StageKind

GROUP = "alignment.stages"
OURS = "alignment"
_BUILT_IN = (
    "cpt",
    "sft",
    "reward",
    "dpo",
    "kto",
    "ppo",
    "sample",
    "distil",
    "evaluate",
    "forgetting",
    "benchmark",
    "report",
    "reward_card",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A kind and the package that it comes from, or the ``problem`` that makes it unusable."""

    name: str
    origin: str
    kind: StageKind | None = None
    problem: str = ""


@cache
def registered() -> Mapping[str, Registered]:
    """All kinds by name, the built-in ones first; unusable ones have a ``problem``."""
    rows = {name: _built_in(name) for name in _BUILT_IN}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        row = _from_entry_point(point)
        if row.name in rows:
            both = f"{rows[row.name].origin} and {row.origin}"
            message = f"is registered twice, by {both}; uninstall one of them, or rename its entry point"
            row = Registered(name=row.name, origin=both, problem=message)
        rows[row.name] = row
    return rows


def _built_in(name: str) -> Registered:
    kind: StageKind = importlib.import_module(f"alignment.stages.{name}.kind").KIND
    return Registered(name=name, origin=OURS, kind=kind)


def _from_entry_point(point: metadata.EntryPoint) -> Registered:
    origin = point.dist.name if point.dist is not None else point.value
    try:
        kind = point.load()
    except Exception as error:  # noqa: BLE001 - another package's code; the other kinds still work
        why = f"{type(error).__name__}: {error}"
        problem = f"cannot be loaded from {point.value} ({origin}): {why}; fix or uninstall that package"
        return Registered(name=point.name, origin=origin, problem=problem)
    is_kind = isinstance(kind, StageKind) and kind.name == point.name
    problem = kind_problems.of_kind(kind) if is_kind else "is not a StageKind of that name; fix its entry point"
    if problem:
        problem = f"cannot be used: {point.value} ({origin}) {problem}"
        return Registered(name=point.name, origin=origin, problem=problem)
    return Registered(name=point.name, origin=origin, kind=kind)


def kinds() -> dict[str, StageKind]:
    """All usable kinds, by name."""
    return {name: row.kind for name, row in registered().items() if row.kind is not None}


def problems() -> dict[str, str]:
    """Why the other registered kinds cannot be used, by name."""
    return {name: row.problem for name, row in registered().items() if row.kind is None}


def config_classes() -> StageClasses:
    """The settings' dataclass of each usable kind, by name, and why the other kinds cannot be used."""
    return StageClasses({name: kind.config for name, kind in kinds().items()}, problems())


def kind_named(name: str, *, where: str = "kind") -> StageKind:
    """The kind of this name.

    Raises:
        ConfigError: there is no such kind, or it cannot be used.
    """
    row = registered().get(name)
    if row is None:
        raise ConfigError(f"{name!r} is not a kind of stage; {suggestion(name, kinds())}", where=where)
    if row.kind is None:
        raise ConfigError(f"the kind of stage {name!r} {row.problem}", where=where)
    return row.kind


def kind_of(config: StageConfig) -> StageKind:
    """The kind of a stage with these settings."""
    return kind_named(config.kind)


def origin_of(kind_name: str) -> str:
    """The package that the kind is from; this one for an unknown kind."""
    row = registered().get(kind_name)
    return OURS if row is None else row.origin


def produced_by(kind_name: str) -> str:
    """The kind of artifact that stages of this kind make; "" for an unknown kind, as in an old record."""
    return kinds()[kind_name].produces if kind_name in kinds() else ""


def trains(kind_name: str) -> bool:
    """Whether stages of this kind train a model; False for an unknown kind."""
    return kind_name in kinds() and kinds()[kind_name].trains


def as_trained(config: StageConfig) -> TrainedConfig | None:
    """The settings, typed as those of a stage that trains; None for any other stage."""
    return cast(TrainedConfig, config) if kind_of(config).trains else None


def learned_data(config: StageConfig) -> tuple[RowKind, Limits]:
    """How the ``data`` of a stage that trains becomes rows of tokens, and how long these may be."""
    kind = kind_of(config)
    slot = next(slot for slot in kind.data(config) if slot.field == "data")
    assert slot.rows is not None, "a stage that trains learns from rows of tokens"
    return slot.rows, kind.learning.limits(config)


def curves(kind_name: str, settings: Mapping[str, Any]) -> list[Curve]:
    """The charts of a stage of this kind with these plain settings; only the loss for an unknown kind."""
    return list(kinds()[kind_name].curves(settings)) if kind_name in kinds() else [LOSS]


def headline_curve(kind_name: str, settings: Mapping[str, Any]) -> Curve | None:
    """The chart that is shown while a stage of this kind runs, with its metric as the only one; None without charts."""
    metric = kinds()[kind_name].headline if kind_name in kinds() else ""
    for chart in curves(kind_name, settings):
        if metric in ("", *chart.keys):
            return replace(chart, keys=(metric or chart.keys[0],), labels=("",))
    return None


def tokens_of(kind_name: str, settings: Mapping[str, Any], line: Mapping[str, Any]) -> float | None:
    """The tokens of a line of metrics.jsonl that does not count them itself; None if that cannot be told."""
    return kinds()[kind_name].tokens(settings, line) if kind_name in kinds() else None


def learns_from(kind_name: str, settings: Mapping[str, Any]) -> LearnsFrom | None:
    """What teaches the policy of a stage of this kind with these plain settings; None for any other stage.

    A reward model has learned from preferences, so its scores count as these.
    """
    teacher = kinds()[kind_name].learning.learns_from if kind_name in kinds() else None
    by_model = any(source == REWARD or is_reference(source) for source in _sources(settings.get("scorers", REWARD)))
    return LearnsFrom.preferences if teacher is LearnsFrom.scores and by_model else teacher


def _sources(scorers: Any) -> Iterator[str]:
    """The sources in plain settings of scorers, those of an ensemble's members too."""
    if isinstance(scorers, str):
        yield scorers
    elif isinstance(scorers, list):
        for scorer in scorers:
            yield from _sources(scorer)
    elif isinstance(scorers, Mapping):
        yield from _sources([scorers.get(name) for name in ("source", "ensemble", "members")])


def doubts(kind_name: str, metrics: Mapping[str, float]) -> list[str]:
    """Warnings against using a result of this kind, given the metrics in its manifest; KindError as in ``lines_of``."""
    return _shown(kind_name, "doubts", metrics)


def lines_of(kind_name: str, artifact: Path) -> list[str]:
    """The lines printed about a result of this kind.

    Raises:
        KindError: a function of another package failed.
    """
    return _shown(kind_name, "lines", artifact)


def tables_of(kind_name: str, artifact: Path) -> list[ResultTable]:
    """The tables of a result of this kind.

    Raises:
        FileNotFoundError: the artifact lacks the file.
        ArtifactError: the file is damaged, or was written by a newer version.
        KindError: a function of another package failed.
    """
    return _shown(kind_name, "tables", artifact)


def _shown(kind_name: str, name: str, given: Any) -> list[Any]:
    """What ``Outcome.NAME`` of the kind returns; faults in another package's function name its line."""
    row = registered().get(kind_name)
    if row is None or row.kind is None:
        return []
    function = getattr(row.kind.outcome, name)
    if row.origin == OURS:
        return list(function(given))
    may_lack_files = name == "tables" and read_manifest(given) is None
    passes = (AlignmentError, FileNotFoundError) if may_lack_files else (AlignmentError,)
    where = f"kind of stage {kind_name!r} ({row.origin})"
    return kind_problems.returned(function, given, name=f"Outcome.{name}", where=where, passes=passes)


def read_spec(path: Path) -> StageSpec:
    """Reads a ``stage.yaml`` into a typed ``StageSpec``."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = stage_from_plain(raw["config"], config_classes())
    return StageSpec(
        config=config,
        produces=kind_of(config).produces,
        model=ModelConfig(
            source=raw["model"]["source"],
            dtype=Dtype(raw["model"]["dtype"]),
            chat_template=raw["model"].get("chat_template"),
            template_options=raw["model"].get("template_options", {}),
        ),
        base_path=Path(raw["base_path"]),
        inputs={name: _input(value) for name, value in raw["inputs"].items()},
        arms={name: _input(value) for name, value in raw["arms"].items()},
        data_path=Path(raw["data_path"]),
        sharding=Sharding(raw["launch"]["sharding"]),
        offload=Offload(raw["launch"]["offload"]),
        extra_data={name: Path(path) for name, path in raw.get("extra_data", {}).items()},
        artifact=Path(raw["artifact"]),
        work=Path(raw["work"]),
        run_folder=Path(raw["run_folder"]),
        recipe=raw["recipe"],
        tracking=TrackingConfig(**raw["tracking"]),
        **{
            name: raw[name]
            for name in ("run", "stage", "fingerprint", "identity", "input_fingerprints", "seed", "git_commit")
        },
    )


def _input(raw: dict[str, Any]) -> StageInput:
    return StageInput(ref=raw["ref"], path=None if raw["path"] is None else Path(raw["path"]))
