"""The interface of trackers, and what every tracker receives about a stage. Nothing of it is from the environment."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.launch import Sharding
from alignment.config.typed import to_plain
from alignment.core.artifacts import Manifest, write_json
from alignment.core.files import write_text
from alignment.core.hardware import versions
from alignment.job import StageSpec
from alignment.records.training import readable_rows, rounded

Cell = str | int | float | bool | None
TOKEN = "tracking-token.json"
"""A file in the stage's folder of the run, outside of all that a tracker writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One step: its curves by name (tracker.py), and when it was logged, in seconds since 1970. ``Row(step=3,
    curves={"loss": 0.5, "seconds": 1.25}, time=1.8e9)``"""

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
    """The id of a stage in every tracker, which stays the same when the stage is resumed in its folder. A token that is
    drawn once and stored there distinguishes it from the same stage of other users of the project."""
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


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Cell]:
    """Nested values under joined names (``adapter/rank``), and lists as JSON."""
    cells: dict[str, Cell] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            cells |= flattened(value, f"{prefix}{name}/")
        else:
            cells[prefix + name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return cells


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


class TableFiles(Tracker):
    """Keeps what other trackers get and no other file has: ``<name>.jsonl``, a line for each row of a table."""

    def __init__(self, spec: StageSpec) -> None:
        self._folder = _folder(spec)

    def log(self, rows: Sequence[Row]) -> None:
        """Keeps nothing: steps are in ``metrics.jsonl``."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Replaces the table of this name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        write_text(self._folder / f"{name}.jsonl", "".join(lines))

    def result(self, manifest: Manifest, folder: Path) -> None:
        """Keeps nothing: the result is in its manifest."""

    def close(self, *, done: bool) -> None:
        """Does nothing: every table is written at once."""


def stored_tables(spec: StageSpec) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables that a stage has sent, by the table's name."""
    return {file.stem: readable_rows(file)[0] for file in sorted(_folder(spec).glob("*.jsonl"))}


def _folder(spec: StageSpec) -> Path:
    """The folder of these settings, apart from that of others with which the run was started earlier."""
    return spec.run_folder / "tables" / spec.fingerprint[:8]
