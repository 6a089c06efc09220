"""Groups of settings that a recipe takes from elsewhere: ``optim: ${stages.dpo_1.optim}``."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.pipeline.plan.hostile import hostile


def passes_reference(tree: DictConfig, key: str) -> bool:
    """Whether the dotted key is that of a reference, or leads through one."""
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        if OmegaConf.is_interpolation(node, name):
            return True
        node = _value(node, name)
    return False


def copy_groups(tree: DictConfig, key: str) -> None:
    """Puts copies of groups in place of the references to them on the way to a dotted key, which is set next.

    OmegaConf would put an empty group there, and the rest of the settings would be lost.
    """
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, DictConfig) or _reads_outside(node, name):
            return
        group = _value(node, name)
        if OmegaConf.is_interpolation(node, name) and isinstance(group, (DictConfig, ListConfig)):
            node[name] = group
        node = _value(node, name)


def _reads_outside(node: DictConfig, name: str) -> bool:
    """Whether an interpolation stands there that is not allowed; what it reads must not become a part of the tree."""
    if not OmegaConf.is_interpolation(node, name):
        return False
    written: Any = OmegaConf.to_container(node, resolve=False)
    return any(hostile(written[name], where=name))


def _value(node: DictConfig, name: str) -> Any:
    """What stands there or is referred to; None if that is nothing, which the check of the whole tree reports."""
    try:
        return OmegaConf.select(node, name)
    except OmegaConfBaseException:
        return None
