"""A YAML block as a recipe: whole ones as they are, fragments laid over a shipped one."""

from __future__ import annotations

import re
from typing import Any

import yaml

from alignment.pipeline.plan.compose import compose
from alignment.stages.registry import kinds
from tests.documented.blocks import Block

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
    """A recipe that holds the block's settings.

    A fragment overrides the settings of the quickstart, or of the recipe that ``on:`` names. Stages that it sets or
    refers to and that the recipe lacks are added; the beginning of their names, or the name ``judge``, says of which
    kind they are.
    """
    tree = tree_of(block)
    if "defaults" in tree:
        return block.text
    host = block.comments.get("on", HOST)
    known = compose(host, []).tree["stages"]
    assert "stages" in tree or set(tree) <= {"model", "launch", "tracking"}, (
        f"{block.id}: say where the fragment belongs, such as <!-- in: stages.ppo -->"
    )
    named = dict.fromkeys([*tree.get("stages", {}), *re.findall(r"stage:(\w+)", block.text)])
    added = {name: _kind(name) for name in named if name not in known}
    for name, kind in added.items():
        tree.setdefault("stages", {}).setdefault(name, {}).setdefault("data", {"source": ROWS[kind]})
    choices = [f"stage@stages.{name}: {kind}" for name, kind in added.items()]
    return f"defaults: [{', '.join([host, *choices, '_self_'])}]\n{yaml.safe_dump(tree, allow_unicode=True)}"


def _kind(name: str) -> str:
    kind = "reward" if name == "judge" else name.split("_")[0]
    assert kind in kinds(), f"no kind of stage begins the name {name}"
    return kind
