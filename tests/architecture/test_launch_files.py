"""What launchers are configured with is about machines; what a stage owns stands in its own configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.config.launch import Sharding
from alignment.core.files import shipped

FILES = sorted(path for path in shipped("launch").rglob("*") if path.suffix in (".json", ".yaml"))
OWNED = ("batch_size", "accumulation", "clipping", "lr", "learning_rate", "optimizer", "scheduler", "steps", "seed")
"""Parts of the names of settings that belong to a stage."""


def values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, item in node.items():
            yield from values(item, f"{path}.{key}")
    else:
        yield path, node


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_no_number_stands_there_that_a_stage_owns(file: Path) -> None:
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML
    for path, value in values(settings):
        name = path.rpartition(".")[2]
        if any(part in name for part in OWNED) and not name.startswith("zero_"):
            assert value == "auto", path
        assert name not in ("fp16", "bf16", "dtype"), path
        assert name != "mixed_precision" or value == "no", path


def test_every_sharding_has_a_file_and_a_choice() -> None:
    names = {path.stem for path in FILES}
    for sharding in Sharding:
        if sharding is not Sharding.none:
            assert sharding.value in names
            choice = yaml.safe_load((shipped("conf") / "launch" / f"{sharding.value}.yaml").read_text(encoding="utf-8"))
            assert choice == {"sharding": sharding.value, "num_processes": 0}
    for sharding in (s for s in Sharding if s.by_deepspeed):
        config = json.loads((shipped("launch") / "deepspeed" / f"{sharding.value}.json").read_text(encoding="utf-8"))
        assert f"zero{config['zero_optimization']['stage']}" == sharding.value
