"""Settings in the form that a reader would type: one dotted key for each, and values as in YAML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key: ``{"scorers": [{"source": "reward"}]}`` gives ``scorers[0].source``. A list of plain values
    is one value, and so is an empty mapping or list."""
    if isinstance(tree, Mapping) and tree:
        branches = [(f"{key}.{name}" if key else str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, (Mapping, list)) for item in tree):
        branches = [(f"{key}[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {key: tree} if key else {}
    return {inner: value for branch, item in branches for inner, value in flat(item, branch).items()}


def shown(value: Any) -> str:
    """``not set`` for null, ``none`` for an empty list or mapping, text as it is, anything else as JSON."""
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    if isinstance(value, (Mapping, list)) and not value:
        return "none"
    return json.dumps(value, ensure_ascii=False, default=str)
