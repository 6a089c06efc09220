"""The interface of trackers, and what every tracker receives about a stage. Nothing of it is from the environment."""

from __future__ import annotations

import hashlib
import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.launch import Sharding
from alignment.config.typed import to_plain
from alignment.core.artifacts import Manifest, write_json
from alignment.core.hardware import versions
from alignment.job import StageSpec

Cell = str | int | float | bool | None
TOKEN = "tracking-token.json"
"""A file in the stage's folder of the run, outside of all that a tracker writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One step: its curves by name (curve_names.py), and when it was logged, in seconds since 1970.

    ``Row(step=3, curves={"loss": 0.5, "seconds": 1.25}, time=1.8e9)``
    """

    step: int
    curves: Mapping[str, float]
    time: float


class Tracker(ABC):
    """Follows one stage. Any method may raise; the caller then continues without this tracker."""

    @abstractmethod
    def log(self, rows: Sequence[Row]) -> None:
        """Sends steps in their order. It skips those that the tracker already has from an earlier attempt."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Sends a table."""

    @abstractmethod
    def result(self, manifest: Manifest, folder: Path) -> None:
        """Sends the headline metrics of the artifact in ``folder``, and its inputs."""

    @abstractmethod
    def close(self, *, done: bool) -> None:
        """Flushes what was sent; ``done`` is True if the stage has finished."""


def stable_id(spec: StageSpec) -> str:
    """The id of a stage in every tracker, which stays the same when the stage is resumed in its folder.

    A token that is drawn once and stored there distinguishes it from the same stage of other users of the project.
    """
    token = spec.run_folder / TOKEN
    if not token.exists():
        write_json(token, secrets.token_hex(16))
    identity = f"{token.read_text(encoding='utf-8')}/{spec.run}/{spec.stage}/{spec.fingerprint}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def settings(spec: StageSpec) -> dict[str, Any]:
    """The stage's resolved settings, with its run, model, launch and versions."""
    config: dict[str, Any] = to_plain(spec.config)
    return config | {
        "run": spec.run,
        "recipe": spec.recipe,
        "stage": spec.stage,
        "model": to_plain(spec.model),
        "seed": spec.seed,
        "launch": {"sharding": spec.sharding.value, "offload": spec.offload.value},
        "fingerprint": spec.fingerprint,
        "git_commit": spec.git_commit,
        "versions": versions(),
    }


def tags(spec: StageSpec) -> list[str]:
    """Recipe, kind of adapter, sharding, and the user's own, without repetitions; W&B limits a tag to 64 characters."""
    adapter = [spec.adapter.kind.value] if spec.adapter is not None else []
    sharding = [spec.sharding.value] if spec.sharding is not Sharding.none else []
    return list(dict.fromkeys([spec.recipe[:64], *adapter, *sharding, *spec.tracking.tags]))


def columns_and_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Cell]]]:
    """Rows as a table: nested values get their own columns (``reward/mean``), lists become JSON."""
    flat = [flattened(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    return columns, [[row.get(name) for name in columns] for row in flat]


def flattened(values: Mapping[str, Any]) -> dict[str, Cell]:
    """Nested values under joined names (``adapter/rank``), and lists as JSON."""
    return _flat(values, "")


def _flat(row: Mapping[str, Any], prefix: str) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            cells |= _flat(value, f"{prefix}{name}/")
        else:
            cells[prefix + name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return cells
