"""A file of an evaluation's cache, next to the artifacts: JSON behind its hash."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from alignment.core.files import parse_json, remove_leftovers, write_text
from alignment.training.context import StageContext

log = logging.getLogger(__name__)


def versions(context: StageContext) -> list[str]:
    """What every computed value depends on: the libraries, the kind of device and the number format."""
    return [torch.__version__, transformers.__version__, context.device.type, context.spec.model.dtype.value]


def path_of(artifact: Path, kind: str, parts: Any) -> Path:
    """The file for a value of this kind that depends on ``parts``."""
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return artifact.parent / "cache" / f"{kind}-{key}.json"


def read(file: Path) -> Any:
    """The cached value, or None if the file is missing or damaged."""
    try:
        sha, _, content = file.read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(content.encode()).hexdigest() != sha:
            raise ValueError("its content differs from its hash")
        return parse_json(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used and will be made again: %s", file, error)
        return None


def write(file: Path, value: Any) -> None:
    """Writes with one rename, so that no machine that shares the folder ever sees an incomplete file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(value)
    remove_leftovers(file.parent, shared=True)
    write_text(file, f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
