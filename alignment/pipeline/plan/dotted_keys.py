"""Dotted keys of groups of settings, such as ``stages.dpo.optim.lr``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a group, with its dotted key."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without(tree: Any, paths: Collection[str], at: str = "") -> Any:
    """The tree, which stands ``at`` a path, without the values at these paths, such as
    ``stages.evaluate.metrics[0].passing_score``."""
    if isinstance(tree, Mapping):
        keys = {key: f"{at}.{key}".removeprefix(".") for key in tree}
        return {key: without(tree[key], paths, path) for key, path in keys.items() if path not in paths}
    if isinstance(tree, (list, tuple)):
        return [without(item, paths, f"{at}[{number}]") for number, item in enumerate(tree)]
    return tree


def nested(keys: Sequence[str], value: Any) -> Any:
    """The value inside a group for each of the keys."""
    for key in reversed(keys):
        value = {key: value}
    return value
