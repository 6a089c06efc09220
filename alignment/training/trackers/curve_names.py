"""The names of curves, which are the same in every tracker.

Names are those of ``metrics.jsonl``. Trackers reserve some, and MLflow takes only letters, digits and ``_ - . / :`` and
spaces. A name that one of them would refuse or change is replaced in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from alignment.records.training import rounded
from alignment.training.trackers.tracker import flattened

RESULT = "result/"
"""Begins the names of a result's headline metrics, apart from W&B, whose summary and sweeps have them bare."""

_RESERVED = frozenset({"step", "time", "timestamp", "run", "project", "metrics"})
"""trackio would put ``__`` before them; ``step`` is the axis of W&B's plots."""
_OTHER = re.compile(r"[^A-Za-z0-9_./ -]")


def curve_name(name: str) -> str:
    """A curve's name in every tracker: ``loss`` as it is, ``time`` as ``metric/time``, ``hit@1`` as ``hit_x40_1``."""
    name = _OTHER.sub(lambda match: f"_x{ord(match[0]):x}_", name)
    return f"metric/{name}" if name in _RESERVED or name.startswith(("_", "/", ".")) else name


def curves(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step under their names in every tracker, rounded as in ``metrics.jsonl``."""
    return {
        curve_name(name): float(rounded(value))
        for name, value in flattened(metrics).items()
        if isinstance(value, (int, float))
    }
