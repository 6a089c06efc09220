"""The files of ``conf/`` that a call chooses, by group overrides and by a profile, in Hydra's form; and groups
of settings that a recipe replaces, or takes from elsewhere by a reference."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.config.faults import Fault, suggestion
from alignment.config.run import BACKEND, GROUPS, SEVERAL, conf_folder
from alignment.pipeline.plan import profile as profiles
from alignment.pipeline.plan.hydra_files import Files, hostile
from alignment.pipeline.plan.overrides import leaves
from alignment.pipeline.plan.profile import Profile


def is_group(override: Override) -> bool:
    """Whether an override picks a file (``launch=zero2``, ``adapter@stages.sft.adapter=full``)."""
    is_path = override.package is not None or "/" in override.key_or_group
    return not is_profile(override) and (is_path or override.key_or_group in GROUPS)


def is_profile(override: Override) -> bool:
    """Whether an override picks a profile (``profile=smoke``)."""
    return override.key_or_group == profiles.GROUP


def profile(files: Files, overrides: list[Override]) -> tuple[Profile | None, list[Fault]]:
    """The profile that the command line asks for, and the faults in how it asks. Raises ConfigError: the profile's file
    is malformed."""
    if not overrides:
        return None, []
    where = " ".join(str(override.input_line) for override in overrides)
    if len(overrides) > 1 or overrides[0].is_delete() or overrides[0].package is not None:
        return None, [Fault(where=where, message=f"write {profiles.GROUP}=NAME, once")]
    loader = GlobalHydra.instance().config_loader()
    known = loader.get_group_options(profiles.GROUP, config_name=files.name, overrides=[files.search])
    name = str(overrides[0].value())
    if name not in known:
        return None, [Fault(where=where, message=f"no {profiles.GROUP} '{name}'; {suggestion(name, known)}")]
    shipped, beside = (folder / profiles.GROUP / f"{name}.yaml" for folder in (conf_folder(), files.recipe.parent))
    path = shipped if shipped.is_file() else beside
    files.note(f"{profiles.GROUP}/{name}", path)
    return profiles.read(path), []


def backend(search: str, groups: Sequence[str]) -> DictConfig | None:
    """The settings of the backend that the overrides choose, or None. They replace the recipe's backend settings
    entirely, because the settings of one backend mean nothing to another."""
    chosen = [override for override in groups if override.startswith(f"{BACKEND}=")]
    if not chosen:
        return None
    settings: DictConfig = hydra_compose(overrides=[search, f"+{chosen[-1]}"]).launch.backend
    return settings


def with_profile(overrides: list[Override], chosen: Profile | None) -> list[Override]:
    """The user's choices of files, and the profile's choices for groups that the user left alone."""
    taken = {override.key_or_group for override in overrides}
    files = chosen.choices if chosen is not None else {}
    parser = OverridesParser.create()
    added = [parser.parse_override(f"{group}={file}") for group, file in files.items() if group not in taken]
    return [*added, *overrides]


def expanded(files: Files, overrides: list[Override]) -> tuple[list[str], list[Fault]]:
    """The valid group overrides in Hydra's form, and the faults in the others. A bare ``adapter=full`` becomes one
    override for every stage that picks an adapter."""
    if not overrides:
        return [], []
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(config_name=files.name, overrides=[files.search], run_mode=RunMode.RUN)
    known = dict.fromkeys([*map(str, defaults.overrides.known_choices), *SEVERAL])  # Hydra leaves out lists of files
    keys = [key for key in known if not key.startswith("hydra/")]
    asked: dict[str, Any] = {"config_name": files.name, "overrides": [files.search]}
    options = {name: loader.get_group_options(name, **asked) for name in GROUPS}
    accepted, faults = [], []
    for override in overrides:
        if message := _wrong_with(override, keys, options):
            faults.append(Fault(where=str(override.input_line), message=message))
        elif override.is_add():
            accepted.append(str(override.input_line))
        else:
            choice = override.value()
            value = f"[{','.join(map(str, choice))}]" if isinstance(choice, list) else choice
            accepted += [f"{key}={value}" for key in _matching(override, keys)]
    return accepted, faults


def _matching(override: Override, keys: Sequence[str]) -> list[str]:
    wanted, group = override.get_key_element(), override.key_or_group
    return [key for key in keys if key == wanted or (override.package is None and key.split("@")[0] == group)]


def _wrong_with(override: Override, keys: Sequence[str], files: Mapping[str, list[str]]) -> str:
    group, choice = override.key_or_group, override.value()
    if group not in GROUPS:
        return f"no group '{group}'; {suggestion(group, GROUPS)}"
    if override.is_delete():
        return "a group cannot be removed; choose a different file for it"
    if isinstance(choice, dict):
        return f"a choice is the name of a file, {group}=NAME; {suggestion(str(choice.get('kind', '')), files[group])}"
    for name in choice if isinstance(choice, list) and group in SEVERAL else [choice]:
        if name not in files[group]:
            others = [f"{other}={name}" for other, choices in files.items() if name in choices]
            hint = f"did you mean {' or '.join(others)}?" if others else suggestion(str(name), files[group])
            return f"no {group} '{name}'; {hint}"
    if override.is_add() or _matching(override, keys):
        return ""
    return f"the recipe makes no such choice; {suggestion(override.get_key_element(), keys)}"


_GROUPS = ("adapter", "launch", "model")
_OF_THE_RECIPE = ("launch.num_processes",)
"""Settings that a recipe fits to its batches, whichever file is chosen."""
_MISSING = "???"


def chosen_files(search: str, groups: Sequence[str], overrides: Sequence[Override]) -> dict[str, Mapping[str, Any]]:
    """The files among ``groups`` that the command line's ``overrides`` choose for adapters, launches and models: the
    settings by dotted key, by choice, such as ``adapter@stages.sft.adapter=lora``."""
    by_user = {override.key_or_group for override in overrides if override.key_or_group in _GROUPS}
    last = {choice.partition("=")[0]: choice for choice in (group.lstrip("+") for group in groups)}
    choices = {key: choice for key, choice in last.items() if key.partition("@")[0] in by_user}
    if not choices:
        return {}
    tree = hydra_compose(overrides=[search, *(f"+{choice}" for choice in choices.values())])
    files: dict[str, Mapping[str, Any]] = {}
    for key, choice in choices.items():
        group, _, package = key.partition("@")  # a package says where the settings go
        node = OmegaConf.select(tree, package or group)
        plain = OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}
        files[choice] = dict(leaves(plain, f"{package or group}."))
    return files


def faults(
    files: Mapping[str, Mapping[str, Any]], tree: Mapping[str, Any], *, changed: Collection[str]
) -> Iterator[Fault]:
    """A fault for each setting of the ``chosen_files`` that has another value in the composed ``tree``. The dotted keys
    in ``changed`` may have one: other overrides or a profile set them."""
    values = dict(leaves(tree))
    for choice, settings in files.items():
        for key, value in settings.items():
            is_open = value == _MISSING or "${" in str(value) or key in _OF_THE_RECIPE
            is_changed = any(key == other or key.startswith(f"{other}.") for other in changed)
            if key in values and not is_open and not is_changed and values[key] != value:
                own, chosen = (v if isinstance(v, str) else json.dumps(v, default=str) for v in (values[key], value))
                message = f"the recipe's own {key}={own} replaces it; write {key}={chosen} too"
                yield Fault(where=choice, message=message)


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
    """Puts copies of groups in place of the references to them on the way to a dotted key, which is set next. OmegaConf
    would put an empty group there, and the rest of the settings would be lost."""
    node: Any = tree
    for name in key.split("."):
        if not isinstance(node, DictConfig):
            return
        group = _value(node, name)
        if OmegaConf.is_interpolation(node, name):
            written: Any = OmegaConf.to_container(node, resolve=False)
            if any(hostile(written[name], where=name)):  # what it reads must not become a part of the tree
                return
            if isinstance(group, (DictConfig, ListConfig)):
                node[name] = group
        node = _value(node, name)


def _value(node: DictConfig, name: str) -> Any:
    """What stands there or is referred to; None if that is nothing, which the check of the whole tree reports."""
    try:
        return OmegaConf.select(node, name)
    except OmegaConfBaseException:
        return None
