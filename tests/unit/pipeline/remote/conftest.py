"""A store in the memory of this process, which fsspec brings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from alignment.pipeline.remote.object_store import ObjectStore

_numbers = itertools.count()


@pytest.fixture
def url() -> str:
    return f"memory://store-{next(_numbers)}/prefix"


@pytest.fixture
def store(url: str) -> ObjectStore:
    made = ObjectStore(url)
    made.check_writable()
    assert made.refuses_existing
    return made


def sealed(work: Path, step: int, **files: str) -> Path:
    folder = work / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, content in {"weights": f"weights {step}", **files}.items():
        (folder / name).write_text(content)
    (folder / "alignment_checkpoint.json").write_text(f'{{"step": {step}}}')
    (work / "content").mkdir(exist_ok=True)
    (work / "content" / "metrics.jsonl").write_text("".join(f'{{"step": {n}}}\n' for n in range(1, step + 2)))
    return folder
