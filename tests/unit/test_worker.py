"""What a worker looks at before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignment.config.model import ModelConfig
from alignment.config.stage import SftConfig
from alignment.data.chat_template import template_text
from alignment.errors import DataError
from alignment.fingerprint import content_sha256, digest
from alignment.worker import _refuse_changed_data
from tests.tiny import tiny_spec


def test_data_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("{}")
    spec = tiny_spec(tmp_path, SftConfig(), identity={"data": content_sha256(file)})
    _refuse_changed_data(spec)
    file.write_text("{} ")
    with pytest.raises(DataError, match=r"data\.jsonl: changed since the run was planned"):
        _refuse_changed_data(spec)


def test_a_template_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}")
    source = f"path:{file}"
    identity = {"base": {"chat_template": digest(template_text(source))}}
    model = ModelConfig(source="path:tiny", chat_template=source)
    spec = tiny_spec(tmp_path, SftConfig(), identity=identity, model=model)
    _refuse_changed_data(spec)
    file.write_text("{{ tools }}")
    with pytest.raises(DataError, match=r"model\.chat_template: changed since the run was planned"):
        _refuse_changed_data(spec)
