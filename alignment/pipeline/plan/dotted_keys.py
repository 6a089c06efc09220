"""Dotted keys of groups of settings, such as ``stages.dpo.optim.lr``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is not a group, with its dotted key."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(keys: Sequence[str], value: Any) -> Any:
    """The value inside a group for each of the keys."""
    for key in reversed(keys):
        value = {key: value}
    return value
