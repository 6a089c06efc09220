"""The canonical form of everything that defines a result, and its hash. A fingerprint covers a stage's configuration,
the content of its data, the fingerprints of its inputs, the seed and the stage's revision. It never covers paths,
launch, tracking, versions of libraries (but for the harness of ``benchmark``), or fields marked ``identity: False``
(docs/design/0020). Settings that came later count only if they are set. Values without a stable form (sets, non-finite
floats, objects) are refused. pipeline/plan/references.py says what a stage's is made of, actions.py what follows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

IF_SET = {"identity": "if set"}
"""Metadata of a setting that came later: at its default it is left out, so that older results are still reused."""


def canonical(value: Any) -> Any:
    """``value`` as plain JSON data. Dataclass fields marked ``identity: False`` are left out, and those marked
    ``IF_SET`` where they have their default. Raises TypeError: the value has no stable form."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value) if _counts(f, value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no stable form; a fingerprint needs finite numbers")
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    if isinstance(value, dict):
        return {str(key): canonical(value[key]) for key in sorted(value)}
    raise TypeError(f"{type(value).__name__} has no stable form for a fingerprint")


def _counts(field: dataclasses.Field[Any], config: Any) -> bool:
    if field.metadata.get("identity") != IF_SET["identity"]:
        return bool(field.metadata.get("identity", True))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return bool(canonical(getattr(config, field.name)) != canonical(default))


def digest(value: Any) -> str:
    """SHA-256 of the canonical form, in hexadecimal."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_sha256(path: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """The SHA-256 of a file's content, computed by ``of_file`` if given. The hash of a folder covers the names and
    hashes of the files in it."""
    of_file = of_file or file_sha256
    if not path.is_dir():
        return of_file(path)
    return digest({file.name: of_file(file) for file in path.iterdir() if file.is_file()})


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
