"""The files of ``conf/`` that a call chooses, by group overrides and by a profile, in Hydra's form."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose as hydra_compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from alignment.config.did_you_mean import suggestion
from alignment.config.faults import Fault
from alignment.config.store import BACKEND, GROUPS, SEVERAL, conf_folder
from alignment.pipeline.plan import profile as profiles
from alignment.pipeline.plan.hydra_files import Files
from alignment.pipeline.plan.profile import Profile


def is_group(override: Override) -> bool:
    """Whether an override picks a file (``launch=zero2``, ``adapter@stages.sft.adapter=full``)."""
    is_path = override.package is not None or "/" in override.key_or_group
    return not is_profile(override) and (is_path or override.key_or_group in GROUPS)


def is_profile(override: Override) -> bool:
    """Whether an override picks a profile (``profile=smoke``)."""
    return override.key_or_group == profiles.GROUP


def profile(files: Files, overrides: list[Override]) -> tuple[Profile | None, list[Fault]]:
    """The profile that the command line asks for, and the faults in how it asks.

    Raises:
        ConfigError: the profile's file is malformed.
    """
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
    """The valid group overrides in Hydra's form, and the faults in the others.

    A bare ``adapter=full`` becomes one override for every stage that picks an adapter.
    """
    if not overrides:
        return [], []
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(config_name=files.name, overrides=[files.search], run_mode=RunMode.RUN)
    keys = [str(key) for key in defaults.overrides.known_choices if not str(key).startswith("hydra/")]
    options = {
        group: loader.get_group_options(group, config_name=files.name, overrides=[files.search]) for group in GROUPS
    }
    accepted, faults = [], []
    for override in overrides:
        expanded, fault = _expand(override, keys, options)
        accepted.extend(expanded)
        if fault is not None:
            faults.append(fault)
    return accepted, faults


def _expand(override: Override, keys: list[str], files: dict[str, list[str]]) -> tuple[list[str], Fault | None]:
    group, choice = override.key_or_group, override.value()
    where = str(override.input_line)
    if group not in GROUPS:
        return [], Fault(where=where, message=f"no group '{group}'; {suggestion(group, GROUPS)}")
    if override.is_delete():
        return [], Fault(where=where, message="a group cannot be removed; choose a different file for it")
    if isinstance(choice, dict):
        kind = suggestion(str(choice.get("kind", "")), files[group])
        return [], Fault(where=where, message=f"a choice is the name of a file, {group}=NAME; {kind}")
    names = choice if isinstance(choice, list) and group in SEVERAL else [choice]
    for name in names:
        if name not in files[group]:
            others = [f"{other}={name}" for other, choices in files.items() if name in choices]
            hint = f"did you mean {' or '.join(others)}?" if others else suggestion(str(name), files[group])
            return [], Fault(where=where, message=f"no {group} '{name}'; {hint}")
    if override.is_add():
        return [where], None
    wanted = override.get_key_element()
    matching = [key for key in keys if key == wanted or (override.package is None and key.split("@")[0] == group)]
    if not matching:
        return [], Fault(where=where, message=f"the recipe makes no such choice; {suggestion(wanted, keys)}")
    value = f"[{','.join(map(str, names))}]" if isinstance(choice, list) else choice
    return [f"{key}={value}" for key in matching], None


def nearest_file(error: MissingConfigException) -> str:
    """A hint at what a missing name in ``defaults`` may have meant, or an empty string."""
    missing = (error.missing_cfg_file or "").rpartition("/")[2]
    return f"; {suggestion(missing, error.options)}" if missing and error.options else ""
