"""Finds lists and groups of settings that a recipe file confuses: Hydra refuses to merge them, and names no setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignment.config.faults import Fault
from alignment.config.stage import StageClasses
from alignment.config.typed import convert


def wrong_shapes(content: Mapping[str, Any], classes: StageClasses) -> list[Fault]:
    """The faults in values that are a list or a group, in the ``content`` of one recipe file.

    The kind of a stage that the file does not name is taken from its defaults, or from the stage's name.
    """
    tree = {key: value for key, value in content.items() if key != "defaults"}
    if isinstance(stages := tree.get("stages"), Mapping):
        kinds = _kinds_in_defaults(content.get("defaults"))
        named = {name: {"kind": kinds.get(name, name), **group} for name, group in stages.items() if _is_group(group)}
        tree["stages"] = {name: group for name, group in named.items() if group["kind"] in classes}
        tree["stages"] |= {name: group for name, group in stages.items() if isinstance(group, list)}
    return [fault for fault in convert(tree, classes)[1] if isinstance(_at(content, fault.where), (list, Mapping))]


def _kinds_in_defaults(defaults: Any) -> dict[str, str]:
    """The choice for each stage: ``{stage@stages.mine: sft}`` is usually of that kind."""
    chosen: dict[str, str] = {}
    for entry in defaults if isinstance(defaults, list) else ():
        for key, choice in entry.items() if _is_group(entry) else ():
            package = str(key).rpartition("@stages.")
            if package[1] and isinstance(choice, str):
                chosen[package[2]] = choice
    return chosen


def _at(tree: Any, where: str) -> Any:
    for key in where.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping)
