"""Every setting is read somewhere: a field that nothing reads is a promise that nothing keeps. A field counts as read
where mypy finds that the object is of its own class: that DPO reads a ``clip`` says nothing of PPO's."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mypy import build
from mypy.modulefinder import BuildSource
from mypy.options import Options

from alignment.config.launch import LaunchConfig
from alignment.config.model import ModelConfig
from alignment.config.run import RunConfig, TrackingConfig
from alignment.config.stage import TrainedConfig
from alignment.config.sweep import SweepConfig
from alignment.config.typed import field_types, kinds_of, listed_dataclass
from alignment.pipeline.execute.run import ReportSettings
from alignment.stages.registry import config_classes
from alignment.stages.shared.kind_answers import LimitedConfig
from alignment.stages.shared.language_model import LanguageModelConfig
from alignment.stages.shared.preference_pairs import PairsConfig

STAGES = config_classes()

PACKAGE = Path(__file__).parents[2] / "alignment"
PLUGIN = Path(__file__).with_name("attribute_reads.py")
pytestmark = pytest.mark.xdist_group("mypy")  # one process reads the package

GENERIC = {"kind"}
"""Read by ``typed`` to choose a dataclass, which is all that it is for in a stage."""
Reads = set[tuple[str, str]]


def classes() -> list[type]:
    """Every configuration dataclass, found from the run and its stages."""
    configs: list[type] = []
    todo: list[Any] = [RunConfig, ModelConfig, LaunchConfig, TrackingConfig, SweepConfig, *STAGES.values()]
    while todo:
        cls = todo.pop(0)
        if cls not in configs:
            configs.append(cls)
            for hint in field_types(cls).values():
                inner = (hint, listed_dataclass(hint), *kinds_of(hint).values())
                todo += [group for group in inner if dataclasses.is_dataclass(group)]
    return configs


def attributes_read(sources: list[BuildSource]) -> Reads:
    """Classes and names of their attributes that these sources read outside of config/ and a stage's config.py."""
    options = Options()
    options.incremental = False
    options.cache_dir = os.devnull
    options.follow_imports = "skip"
    options.ignore_missing_imports = True
    options.plugins = [str(PLUGIN)]
    options.config_file = str(PACKAGE.parent / "pyproject.toml")  # where mypy says that the plugin is named
    build.build(sources, options)
    noted = sys.modules[PLUGIN.stem].READS
    reads = {(owner, name) for owner, name, file in noted if "config" not in Path(file).with_suffix("").parts}
    noted.clear()
    return reads


def source(path: Path, text: str | None = None) -> BuildSource:
    """A file of the package, with another ``text`` if one is given."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return BuildSource(str(path), ".".join(parts).removesuffix(".__init__"), text)


@pytest.fixture(scope="module")
def read() -> Reads:
    return attributes_read([source(path) for path in sorted(PACKAGE.rglob("*.py"))])


REFERENCES = {
    (cls, field.name) for cls in STAGES.values() for field in dataclasses.fields(cls) if "reference" in field.metadata
}


PROTOCOLS: list[Any] = [TrainedConfig, LanguageModelConfig, LimitedConfig, PairsConfig, ReportSettings]
"""By which functions that several kinds of stage share read settings."""


def unread(cls: type, read: Reads) -> list[str]:
    """A field that is inherited may be read of the class that declares it, or of a protocol that the class has."""
    fits = [protocol for protocol in PROTOCOLS if set(protocol.__annotations__) <= set(field_types(cls))]
    owners = [f"{owner.__module__}.{owner.__qualname__}" for owner in (*cls.__mro__, *fits)]
    asked = [name for name in field_types(cls) if name not in GENERIC and (cls, name) not in REFERENCES]
    return [name for name in asked if not any((owner, name) in read for owner in owners)]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_field_is_read(cls: type, read: Reads) -> None:
    assert not unread(cls, read)
