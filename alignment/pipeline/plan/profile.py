"""Profiles scale any recipe, by settings for each kind of stage (docs/design/0011).

A file of ``conf/profile/`` does not know the names of a recipe's stages, so Hydra does not merge it. Its values for a
kind apply to every stage of that kind, after the recipe's values and before those of the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alignment.config import yaml_file
from alignment.config.faults import suggestion
from alignment.config.run import GROUPS
from alignment.core.errors import ConfigError
from alignment.pipeline.plan.overrides import nested
from alignment.stages import registry

GROUP = "profile"
_HUB = "hub:"
SMOKE = "smoke"


def _allowed() -> dict[str, tuple[str, ...]]:
    """The allowed keys of each part of a profile, except ``values``, whose keys are checked with the run's."""
    kinds = registry.kinds()
    sources = [
        name if slot.field == "data" else f"{name}.{slot.field}"
        for name, kind in kinds.items()
        for slot in kind.data(kind.config())
    ]
    sources += [
        f"{name}.{registry.LEAVE_OUT}" for name, kind in kinds.items() if hasattr(kind.config(), registry.LEAVE_OUT)
    ]
    return {
        "choices": tuple(GROUPS),
        "stages": tuple(kinds),
        "for_each_process": tuple(kinds),
        "where_named": tuple(sources),
        "instead_of_hub": ("model", *sources),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """``choices`` apply to groups that the command line leaves alone, ``values`` to the run, ``stages`` to each stage
    of a kind. ``for_each_process`` holds integers for one process, which are multiplied by their number.
    ``where_named`` holds settings of a group that has data, by the dotted name of the data, for recipes that name
    these. ``instead_of_hub`` gives the source in place of a hub's: for ``model``, a kind's ``data``, or another of its
    fields by its dotted name."""

    name: str
    choices: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    for_each_process: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    where_named: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    instead_of_hub: Mapping[str, str] = field(default_factory=dict)

    def applied_to(self, tree: Mapping[str, Any], *, processes: int = 1) -> dict[str, Any]:
        """The tree of a recipe with this profile's values, for this number of processes."""
        changed = merged(tree, self.values)
        if "model" in self.instead_of_hub and _names_hub(changed.get("model")):
            changed["model"] = merged(changed["model"], {"source": self.instead_of_hub["model"]})
        stages = changed.get("stages")
        if isinstance(stages, Mapping):
            changed["stages"] = {name: self._stage(stage, processes) for name, stage in stages.items()}
        return changed

    def changes(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """All that ``applied_to`` may set in this tree; the values do not count."""
        stages = tree.get("stages")
        named = stages.items() if isinstance(stages, Mapping) else ()
        of_stages = {name: self._changes_of(stage) for name, stage in named if isinstance(stage, Mapping)}
        model = {"model": {"source": ""}} if "model" in self.instead_of_hub else {}
        return merged(merged(self.values, model), {"stages": of_stages})

    def named(self, name: str) -> str:
        """The run's name with this profile's, so that nobody mistakes it for a run without the profile."""
        parts = name.split(".")  # a sweep's trials have it in the first part: mine-smoke.dpo_beta.3
        return name if any(part.endswith(f"-{self.name}") for part in parts) else f"{name}-{self.name}"

    def _stage(self, stage: Any, processes: int) -> Any:
        if not isinstance(stage, Mapping):
            return stage
        kind, changed = str(stage.get("kind")), dict(stage)
        for slot, source in self.instead_of_hub.items():
            if keys := _keys_of(slot, kind):
                changed = _without_hub(changed, keys, source)
        for slot, values in self.where_named.items():
            if keys := _keys_of(slot, kind):
                changed = _merged_where_named(changed, keys, values)
        per_process = times(self.for_each_process.get(kind, {}), processes)
        return merged(merged(changed, self.stages.get(kind, {})), per_process)

    def _changes_of(self, stage: Mapping[str, Any]) -> dict[str, Any]:
        kind = str(stage.get("kind"))
        changes = merged(self.stages.get(kind, {}), self.for_each_process.get(kind, {}))
        for slot in (*self.instead_of_hub, *self.where_named):
            if keys := _keys_of(slot, kind):
                *outer, last = keys
                changes = merged(changes, nested([*outer, last], {"source": ""}))
                changes = merged(changes, nested(outer, self.where_named.get(slot, {})))
        return changes


def read(path: Path) -> Profile:
    """The profile that a file describes. Raises ConfigError: its file is malformed."""
    name = path.stem
    content = yaml_file.read(path) or {}
    parts = _group(content, [part.name for part in fields(Profile) if part.name != "name"], where=str(path))
    for part, value in parts.items():
        _group(value, _allowed().get(part), where=f"{path}: {part}")
    for part in ("stages", "for_each_process", "where_named"):
        for kind, value in parts.get(part, {}).items():
            _group(value, where=f"{path}: {part}.{kind}")
    if name == SMOKE:  # kinds of other packages define their own smoke settings
        own_settings = {kind.name: kind.smoke for kind in registry.kinds().values() if kind.smoke}
        parts = {**parts, "stages": {**own_settings, **parts.get("stages", {})}}
    return Profile(name=name, **parts)


def merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Both trees merged; where both have a key, the value of ``over`` wins. Groups are merged, lists replaced."""
    both = {
        key: merged(tree[key], value) if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping) else value
        for key, value in over.items()
    }
    return {**tree, **both}


def times(tree: Any, number: int) -> Any:
    """The tree with every integer in it multiplied by ``number``."""
    if isinstance(tree, Mapping):
        return {key: times(value, number) for key, value in tree.items()}
    return tree * number if type(tree) is int else tree


def _without_hub(tree: Mapping[str, Any], keys: Sequence[str], source: str) -> dict[str, Any]:
    """The tree with another source at these keys, if a hub's is there; the hub's split and columns are dropped. In a
    list, each source of a hub is replaced."""
    first, *rest = keys
    group = tree.get(first)
    if rest:
        return {**tree, first: _without_hub(group, rest, source)} if isinstance(group, Mapping) else dict(tree)
    if isinstance(group, list):
        return {**tree, first: [{"source": source} if _names_hub(item) else item for item in group]}
    return {**tree, first: {"source": source}} if _names_hub(group) else dict(tree)


def _merged_where_named(tree: Mapping[str, Any], keys: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    first, *rest = keys
    group = tree.get(first)
    if not isinstance(group, Mapping):
        return dict(tree)
    if rest:
        return {**tree, first: _merged_where_named(group, rest, values)}
    return merged(tree, values) if group.get("source") else dict(tree)


def _keys_of(slot: str, kind: str) -> list[str]:
    """The keys of ``sft.validation.data`` for the kind ``sft``, ``data`` for its bare name; empty for other kinds."""
    name, _, keys = slot.partition(".")
    return (keys or "data").split(".") if name == kind else []


def _names_hub(group: Any) -> bool:
    source = group.get("source") if isinstance(group, Mapping) else None
    return isinstance(source, str) and source.startswith(_HUB)


def _group(content: Any, allowed: Sequence[str] | None = None, *, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{content!r} is not a group of settings", where=where, remedy="write {key: value}")
    for key in content:
        if allowed is not None and key not in allowed:
            raise ConfigError(f"unknown key '{key}'; {suggestion(str(key), allowed)}", where=where)
    return content
