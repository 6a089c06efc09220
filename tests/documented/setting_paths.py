"""Which settings and options exist, by their own declarations, and a YAML block as a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any

import yaml

from alignment import cli
from alignment.config.run import RunConfig
from alignment.config.sweep import SweepConfig
from alignment.config.typed import field_types, group_of, kinds_of, listed_dataclass
from alignment.pipeline.plan.compose import compose
from alignment.stages.registry import config_classes, kinds
from tests.documented.blocks import Block

MISSING = object()
"""The default of a setting that has none."""


@cache
def defaults() -> dict[str, list[Any]]:
    """Every path with its defaults; several where the setting depends on a kind, as ``launch.backend.num_machines``.
    Stages are called by their kinds: ``stages.dpo.beta``. Settings inside lists follow the list: ``scorers.weight``."""
    by_path: dict[str, list[Any]] = {}
    for path, _, default in _every():
        by_path.setdefault(path, []).append(default)
    return by_path


@cache
def choices() -> dict[str, list[str]]:
    """The values of each setting that has a fixed list of them."""
    return {path: [str(value.value) for value in hint] for path, hint, _ in _every() if _is_enum(hint)}


def _every() -> Iterator[tuple[str, Any, Any]]:
    yield from _below(RunConfig, RunConfig(name="run"), "")
    for kind, cls in config_classes().items():
        yield from _below(cls, cls(), f"stages.{kind}.")
    yield from _below(SweepConfig, SweepConfig(), "sweep.")


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


@cache
def ending_in(path: str) -> list[str]:
    return [known for known in defaults() if known == path or known.endswith(f".{path}")]


def _below(cls: type, instance: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name, hint in field_types(cls).items():
        value = getattr(instance, name, MISSING) if instance is not None else MISSING
        yield f"{prefix}{name}", hint, value.value if isinstance(value, Enum) else value
        inner = [cls_inside for cls_inside in (group_of(hint), listed_dataclass(hint)) if cls_inside is not None]
        for cls_inside in (*inner, *kinds_of(hint).values()):
            own = value if type(value) is cls_inside else _made(cls_inside)
            yield from _below(cls_inside, own, f"{prefix}{name}.")


def _made(cls: type) -> Any:
    required = [field for field in dataclasses.fields(cls) if _is_required(field)]
    return None if required else cls()


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@cache
def options_of(verb: str) -> frozenset[str]:
    parser = argparse.ArgumentParser()
    cli.load(verb).add_arguments(parser)
    return frozenset(name for action in parser._actions for name in action.option_strings if name.startswith("--"))


def all_options() -> frozenset[str]:
    return frozenset().union(*(options_of(verb) for verb in cli.VERBS), {"--help", "--version"})


HOST = "quickstart"
ROWS = {"reward": "path:pairs.jsonl", "dpo": "path:pairs.jsonl", "sample": "path:prompts.jsonl"}
"""Data of the stages that a fragment only mentions."""
_LEFT_OUT = re.compile(r",? *…(?= *[}\]])")
"""An ellipsis at the end of a flow mapping stands for settings that the page leaves out."""


def tree_of(block: Block) -> dict[str, Any]:
    """The block's YAML, without its ellipses, below the key that ``in:`` names."""
    tree: dict[str, Any] = yaml.safe_load(_LEFT_OUT.sub("", block.text))
    assert isinstance(tree, dict), f"{block.id}: a block of YAML is a group of settings"
    for key in reversed(block.comments.get("in", "").split(".")):
        tree = {key: tree} if key else tree
    return tree


def recipe_text(block: Block) -> str:
    """A recipe that holds the block's settings: itself, if it has a summary. A fragment overrides the settings of the
    quickstart, or of the recipe that ``on:`` names. Stages that it sets or refers to and that the recipe lacks are
    added; the beginning of their names, or the name ``judge``, says of which kind they are."""
    tree = tree_of(block)
    if "defaults" in tree or {"stages", "summary"} <= tree.keys():
        return block.text
    host = block.comments.get("on", HOST)
    known = compose(host, []).tree["stages"]
    assert "stages" in tree or set(tree) <= {"model", "launch", "tracking"}, (
        f"{block.id}: say where the fragment belongs, such as <!-- in: stages.ppo -->"
    )
    named = dict.fromkeys([*tree.get("stages", {}), *re.findall(r"stage:(\w+)", block.text)])
    tree["stages"] = {name: stage for name, stage in tree.get("stages", {}).items() if stage is not None}
    added = {name: _kind(name) for name in named if name not in known}
    for name, kind in added.items():
        tree["stages"].setdefault(name, {}).setdefault("data", {"source": ROWS[kind]})
    choices = [f"stage@stages.{name}: {kind}" for name, kind in added.items()]
    return f"defaults: [{', '.join([host, *choices, '_self_'])}]\n{yaml.safe_dump(tree, allow_unicode=True)}"


def _kind(name: str) -> str:
    kind = "reward" if name == "judge" else name.split("_")[0]
    assert kind in kinds(), f"no kind of stage begins the name {name}"
    return kind
