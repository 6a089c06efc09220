"""Sizes of micro-batches that stages with ``optim.micro_batch_tokens=auto`` chose, remembered by machine.

The file ``artifacts/cache/micro-batch-KEY.json`` has one entry for each machine and launch; ``KEY`` is the hash of all
else that decides how much memory a micro-batch takes (``memory_key``). A stage that is not done has its own entry in
``micro_batch.json`` of its work folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from alignment.core import typed_json
from alignment.core.errors import ArtifactError
from alignment.core.typed_json import Name

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
    25 GB", launch="1 process")``.
    """

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
