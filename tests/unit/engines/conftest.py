"""A tiny model for the servers of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "model"
    tiny_model(vocab_size=24).save_pretrained(str(folder))
    return folder
