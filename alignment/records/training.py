"""Records of training: metrics by step, validation, and the sizes that were found."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.files import naming, parse_json, write_text
from alignment.core.typed_json import Name

METRICS = "metrics.jsonl"
TOKENS = "num_tokens"
"""The metric that counts the tokens that a stage has processed since it began, as TRL's trainers name it."""


class MetricsLog:
    """Appends steps to a file; lines after a step can be dropped when a stage continues from a checkpoint."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one step; non-finite numbers are written as they are (``NaN``), to be visible."""
        line = json.dumps({"step": step, **{key: rounded(value) for key, value in metrics.items()}})
        with naming(self._path), self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def keep_through(self, step: int) -> None:
        """Drops the lines after ``step``, including a half-written last line."""
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines_to_keep = [line for line in lines if _step_of(line) <= step]
        write_text(self._path, "".join(line + "\n" for line in lines_to_keep))

    def last(self) -> dict[str, Any]:
        return (self.rows() or [{}])[-1]

    def rows(self) -> list[dict[str, Any]]:
        lines = self._path.read_text(encoding="utf-8").split("\n") if self._path.exists() else []
        return [parse_json(line) for line in lines if line]


def written_rows(path: Path) -> list[dict[str, Any]]:
    """The steps of a file to which a stage may be writing now: a line counts once it has ended. Raises
    FileNotFoundError: there is no such file; ValueError: a line is not JSON."""
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [parse_json(line) for line in lines]


def readable_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file of lines, and how many lines are not objects; a killed writer can leave half a line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return [], 1
    rows = [_object(line) for line in lines if line.strip()]
    return [row for row in rows if row is not None], rows.count(None)


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def rounded(value: Any) -> Any:
    """A value as the file has it: numbers with six significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


PREFIX = "validation/"
LOSS, ACCURACY = f"{PREFIX}loss", f"{PREFIX}accuracy"
"""The training objective on the held-out rows, and how often it is right there; in a manifest, of what is handed on."""
STEP = f"{PREFIX}step"
"""The optimiser step whose weights are handed on."""
LAST_STEP, LAST_LOSS = f"{PREFIX}last_step", f"{PREFIX}last_loss"
"""The last step, and the held-out loss there."""
PLANNED_STEPS = f"{PREFIX}planned_steps"
ROWS = f"{PREFIX}rows"
HELD_OUT = (LOSS, ACCURACY)
COUNTS = (STEP, LAST_STEP, LAST_LOSS, PLANNED_STEPS, ROWS)


def outcome(metrics: Mapping[str, float], *, patience: int | None) -> list[str]:
    """Sentences, without a full stop, on an earlier step that is handed on and on an early end; none without these."""
    if not all(name in metrics for name in (LOSS, STEP, LAST_STEP, LAST_LOSS, PLANNED_STEPS)):
        return []
    step, last, planned = (int(metrics[name]) for name in (STEP, LAST_STEP, PLANNED_STEPS))
    sentences = []
    if step < last:
        sentences.append(
            f"keeps step {step}, which had the lowest held-out loss: {metrics[LOSS]:.4g} ({metrics[LAST_LOSS]:.4g} "
            f"at step {last}); that loss is optimistic, because the step was chosen by it"
        )
    if last < planned:
        looks = "" if patience is None else f": no improvement in {patience} validation{'' if patience == 1 else 's'}"
        sentences.append(f"stopped at step {last} of {planned}{looks}")
    return sentences


log = logging.getLogger(__name__)

OWN_FILE = "micro_batch.json"
USAGE = "micro_batch_tokens"
"""The key of the chosen number in the ``usage`` of a manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TriedSize:
    """A size that was tried: the ``tokens`` of its largest micro-batch, the highest bytes of a process or of its GPU in
    a step on them, and the step's seconds. ``fits``: on each process there was enough memory, with a margin."""

    limit: int
    tokens: int
    bytes: float
    seconds: float
    fits: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSize:
    """The number of ``tokens`` that was chosen on a ``machine``, and the sizes that were tried.

    ``launch`` is how many processes share the work, and how. Example: ``ChosenSize(tokens=2048, machine="CPU, 2 cores,
    25 GB", launch="1 process")``."""

    tokens: int
    machine: Name
    launch: Name
    tried: list[TriedSize] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSizes:
    """What ``key`` chose on each machine."""

    key: str
    sizes: list[ChosenSize] = field(default_factory=list)
    version: int = 1


def cache_file(artifacts: Path, key: str) -> Path:
    """Where the sizes of a key are remembered for all runs with these artifacts."""
    return cache_files(artifacts).with_name(f"micro-batch-{key[:32]}.json")


def cache_files(artifacts: Path) -> Path:
    """The pattern of all of them."""
    return artifacts / "cache" / "micro-batch-*.json"


def remembered(file: Path, key: str) -> list[ChosenSize]:
    """The sizes in a file; empty without a file of this key. A damaged file counts as none, and the log names it."""
    try:
        content = typed_json.read(file, ChosenSizes, remedy="it will be written again")
    except FileNotFoundError:
        return []
    except ArtifactError as error:
        log.warning("a stored size of micro-batches cannot be used, so it will be chosen again: %s", error)
        return []
    return [size for size in content.sizes if size.tokens > 0] if content.key == key else []


def remember(file: Path, key: str, size: ChosenSize) -> None:
    """Adds a size to a file, in place of an earlier one of the same machine and launch."""
    own = (size.machine, size.launch)
    others = [other for other in remembered(file, key) if (other.machine, other.launch) != own]
    file.parent.mkdir(parents=True, exist_ok=True)
    typed_json.write(file, ChosenSizes(key=key, sizes=[*others, size]))
