"""What is kept beside the artifacts may lie on a file system that several machines share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alignment.core.artifacts import write_json
from alignment.stages.evaluate import answer_cache
from alignment.stages.evaluate.answer_cache import CachedAnswers
from alignment.stages.shared import reference_cache

ANSWERS = CachedAnswers(ids=[[1, 2]], logprobs=None, references=[None], seconds=1.0)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: write_json(file, {"a": 1}),
        lambda file: answer_cache.write(file, ANSWERS),
        lambda file: reference_cache._write(file, {"chosen": torch.ones(2)}),
    ],
    ids=["json", "answers", "reference"],
)
def test_processes_of_the_same_number_on_two_machines_may_write_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """The other one writes all of it while this one is about to rename its own."""
    file, rename = tmp_path / "kept.json", os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", rename)
        write(file)
        rename(source, target)

    monkeypatch.setattr(os, "replace", late)
    write(file)
    assert list(tmp_path.iterdir()) == [file]
