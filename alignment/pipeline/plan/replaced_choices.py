"""Files of groups that the command line chooses, and whose settings the recipe's own replace.

Hydra merges a recipe's own values after the files that it includes, also after those that the command line chooses.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from alignment.config.faults import Fault
from alignment.pipeline.plan.dotted_keys import leaves

_GROUPS = ("adapter", "launch", "model")
_OF_THE_RECIPE = ("launch.num_processes",)
"""Settings that a recipe fits to its batches, whichever file is chosen."""
_MISSING = "???"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenFile:
    """The ``settings`` of a file, by dotted key, and the ``choice``: ``adapter@stages.sft.adapter=lora``."""

    choice: str
    settings: Mapping[str, Any]


def chosen_files(search: str, groups: Sequence[str], overrides: Sequence[Override]) -> list[ChosenFile]:
    """The files among ``groups`` that the command line's ``overrides`` choose for adapters, launches and models."""
    by_user = {override.key_or_group for override in overrides if override.key_or_group in _GROUPS}
    last = {choice.partition("=")[0]: choice for choice in (group.lstrip("+") for group in groups)}
    choices = {key: choice for key, choice in last.items() if key.partition("@")[0] in by_user}
    if not choices:
        return []
    tree = hydra_compose(overrides=[search, *(f"+{choice}" for choice in choices.values())])
    return [ChosenFile(choice=choice, settings=_settings(tree, key)) for key, choice in choices.items()]


def _settings(tree: DictConfig, key: str) -> dict[str, Any]:
    """What the file of a group sets; ``key`` names the group and, behind an @, where its settings go."""
    group, _, package = key.partition("@")
    node = OmegaConf.select(tree, package or group)
    plain = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
    return dict(leaves(plain, f"{package or group}."))


def faults(files: Sequence[ChosenFile], tree: Mapping[str, Any], *, changed: Collection[str]) -> Iterator[Fault]:
    """A fault for each setting of a chosen file that has another value in the composed ``tree``.

    The dotted keys in ``changed`` may have one: other overrides or a profile set them.
    """
    values = dict(leaves(tree))
    for file in files:
        for key, value in file.settings.items():
            is_open = value == _MISSING or "${" in str(value)
            is_changed = any(key == other or key.startswith(f"{other}.") for other in changed)
            if key not in values or key in _OF_THE_RECIPE or is_open or is_changed or values[key] == value:
                continue
            message = (
                f"the recipe's own {key}={_as_written(values[key])} replaces it; write {key}={_as_written(value)} too"
            )
            yield Fault(where=file.choice, message=message)


def _as_written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
