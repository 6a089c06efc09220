"""A recipe and overrides to one plain tree, by Hydra, once.

Hydra merges the files; single values given on the command line are laid over the outcome here, one by one, so that
every misspelling is found rather than the first. Nothing in a configuration can run code or read the environment:
``_target_`` and resolvers are refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.config import yaml_file
from alignment.config.did_you_mean import suggestion
from alignment.config.faults import Fault, refuse
from alignment.config.store import GROUPS, SEVERAL, conf_folder, recipe_names, recipes_folder
from alignment.core.deadline import Bounded
from alignment.core.errors import ConfigError
from alignment.pipeline.plan import profile as profiles
from alignment.pipeline.plan.hostile import hostile
from alignment.pipeline.plan.hydra_files import check_files
from alignment.pipeline.plan.overrides import parse_override
from alignment.pipeline.plan.profile import Profile

_HYDRA = "1.3"
_ENDLESS = ConfigError("its interpolations come to more than can be written down", where="recipe")
_SHOWN_TEXT = 60
_DEEPEST = 30
"""Brackets within one another; Hydra and OmegaConf descend by recursion, and Python ends that at some depth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """What the files and overrides amount to, not yet typed; ``faults`` were found on the way.

    ``written`` are the dotted keys that a recipe file of the user's sets and no override does. ``profile`` is the name
    of what was laid over the recipe, if anything was.
    """

    recipe: str
    tree: dict[str, Any]
    faults: list[Fault]
    written: frozenset[str] = frozenset()
    profile: str = ""

    def placed(self, fault: Fault) -> Fault:
        """The fault with the file that it stands in, if it stands in the user's."""
        return replace(fault, where=f"{self.recipe}: {fault.where}") if fault.where in self.written else fault


def compose(recipe: str, overrides: Sequence[str]) -> Composition:
    """Composes a shipped recipe by name, or a user's by path.

    Raises:
        ConfigError: there is no such recipe, or its files do not compose.
    """
    path = find_recipe(recipe)
    _check_recipe_text(path)
    parsed, faults = _parse(overrides)
    check_files()
    with initialize_config_dir(config_dir=str(path.parent), version_base=_HYDRA):
        search = f"hydra.searchpath=[{_quoted(conf_folder())},{_quoted(recipes_folder())}]"
        try:
            profile, profile_faults = _profile(path, search, [o for o in parsed if _is_profile(o)])
            chosen = [o for o in parsed if _is_group(o)]
            groups, group_faults = _group_overrides(path.stem, search, _with_choices(chosen, profile))
            tree = hydra_compose(config_name=path.stem, overrides=[search, *groups])
        except MissingConfigException as error:
            raise ConfigError(f"{_first_paragraph(error)}{_nearest_file(error)}", where=str(path)) from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(_first_paragraph(error), where=str(path)) from error
    OmegaConf.set_struct(tree, False)
    values = [o for o in parsed if not _is_group(o) and not _is_profile(o)]
    if profile is not None:
        tree = OmegaConf.create(profile.laid_over(_written(tree), processes=_processes(profile, values)))
    value_faults = [fault for o in values for fault in _apply(o, tree)]
    plain, plain_faults = _plain(tree)
    plain.setdefault("name", path.stem)
    if profile is not None and isinstance(plain["name"], str):
        plain["name"] = profile.named(plain["name"])
    found = [*faults, *profile_faults, *group_faults, *value_faults, *plain_faults]
    written = frozenset() if recipe in recipe_names() else _keys_written(path) - {o.key_or_group for o in parsed}
    name = "" if profile is None else profile.name
    return Composition(recipe=recipe, tree=plain, faults=found, written=written, profile=name)


def _keys_written(path: Path) -> frozenset[str]:
    """Every dotted key of a YAML file, those of groups too."""

    def keys(tree: Any, ahead: str) -> Iterator[str]:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            yield f"{ahead}{key}"
            yield from keys(value, f"{ahead}{key}.")

    return frozenset(keys(yaml_file.read(path), ""))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: no such name or file; says what there is.
    """
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe).expanduser().absolute()
        if not path.is_file():
            raise ConfigError(f"no file {path}", where="recipe", remedy=f"shipped recipes: {', '.join(recipe_names())}")
        if path.suffix != ".yaml":
            raise ConfigError(f"{path.name} does not end in .yaml", where="recipe", remedy="rename it")
        return path
    if recipe not in recipe_names():
        raise ConfigError(
            f"no recipe '{recipe}'; {suggestion(recipe, recipe_names())}",
            where="recipe",
            remedy="`align recipes` lists them; a file of your own goes by its path, ./mine.yaml",
        )
    return recipes_folder() / f"{recipe}.yaml"


def _check_recipe_text(path: Path) -> None:
    """Refuses what Hydra itself would act on before a composed tree could be looked at."""
    content = yaml_file.read(path)
    if not isinstance(content, dict):
        raise ConfigError("a recipe is a group of settings", where=str(path), remedy="begin it with: defaults: [base]")
    faults = list(hostile(content, where=""))
    if "hydra" in content:
        faults.append(Fault(where="hydra", message="settings of Hydra itself are not taken"))
    defaults = content.get("defaults", [])
    if isinstance(defaults, list) and "_self_" in defaults[:-1]:
        faults.append(Fault(where="defaults", message="'_self_' must come last, or the recipe's own values are lost"))
    refuse(faults)


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Fault]]:
    parsed, faults = [], []
    for text in overrides:
        if (depth := _depth(text)) > _DEEPEST:
            message = f"brackets within {depth} others; no setting has more than a few"
            faults.append(Fault(where=f"{_shown(text)[:_SHOWN_TEXT]}…", message=message))
            continue
        try:
            override = parse_override(text)
        except HydraException:
            faults.append(_malformed(text))
            continue
        outside = list(hostile({override.key_or_group: text}, where=""))
        if not override.key_or_group:
            faults.append(_malformed(text))
        elif outside:
            faults.extend(outside)
        elif override.is_sweep_override():
            faults.append(Fault(where=_shown(text), message="several values for one key; give one"))
        elif override.key_or_group.split(".")[0].split("/")[0] == "hydra":
            faults.append(Fault(where=text, message="settings of Hydra itself are not taken"))
        else:
            parsed.append(override)
    return parsed, faults


def _depth(text: str) -> int:
    """How many brackets are open at once, at most."""
    opened = itertools.accumulate({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
    return max(opened, default=0)


def _shown(text: str) -> str:
    """The override, without a value that may hold a key or a password."""
    key, _, _ = text.partition("=")
    return f"{key}=…" if key.endswith((".api_key_env", ".base_url")) else text


def _malformed(text: str) -> Fault:
    return Fault(where=_shown(text), message="not an override; write key=value, such as stages.dpo.beta=0.3")


def _is_group(override: Override) -> bool:
    """Whether an override picks a file (``launch=zero2``, ``adapter@stages.sft.adapter=full``)."""
    return not _is_profile(override) and (override.package is not None or override.key_or_group in GROUPS)


def _is_profile(override: Override) -> bool:
    return override.key_or_group == profiles.GROUP


def _profile(path: Path, search: str, overrides: list[Override]) -> tuple[Profile | None, list[Fault]]:
    """The profile that the command line asks for, and what is wrong with how it does.

    Raises:
        ConfigError: its file has another form.
    """
    if not overrides:
        return None, []
    where = " ".join(str(override.input_line) for override in overrides)
    if len(overrides) > 1 or overrides[0].is_delete() or overrides[0].package is not None:
        return None, [Fault(where=where, message=f"write {profiles.GROUP}=NAME, once")]
    loader = GlobalHydra.instance().config_loader()
    known = loader.get_group_options(profiles.GROUP, config_name=path.stem, overrides=[search])
    name = str(overrides[0].value())
    if name not in known:
        return None, [Fault(where=where, message=f"no {profiles.GROUP} '{name}'; {suggestion(name, known)}")]
    return profiles.read(name, [path.parent, conf_folder(), recipes_folder()]), []


def _processes(profile: Profile, overrides: list[Override]) -> int:
    """How many share a stage's rows, where the command line or the profile says so; else one."""
    launch = profile.values.get("launch")
    chosen = dict(launch) if isinstance(launch, Mapping) else {}
    for override in overrides:
        group, _, name = override.key_or_group.partition(".")
        if group == "launch" and not override.is_delete():
            chosen[name] = override.value()
    numbers = [chosen.get(name, 1) for name in ("num_processes", "num_machines")]
    return math.prod(number for number in numbers if type(number) is int and number > 0)


def _with_choices(overrides: list[Override], profile: Profile | None) -> list[Override]:
    """The user's choices of files, and the profile's of groups that the user left alone."""
    taken = {override.key_or_group for override in overrides}
    choices = profile.choices if profile is not None else {}
    parser = OverridesParser.create()
    added = [parser.parse_override(f"{group}={choice}") for group, choice in choices.items() if group not in taken]
    return [*added, *overrides]


def _group_overrides(name: str, search: str, overrides: list[Override]) -> tuple[list[str], list[Fault]]:
    """Group overrides as Hydra takes them, and what is wrong with the others.

    A bare ``adapter=full`` becomes one override for every stage that picks an adapter.
    """
    if not overrides:
        return [], []
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(config_name=name, overrides=[search], run_mode=RunMode.RUN)
    keys = [str(key) for key in defaults.overrides.known_choices if not str(key).startswith("hydra/")]
    files = {group: loader.get_group_options(group, config_name=name, overrides=[search]) for group in GROUPS}
    accepted, faults = [], []
    for override in overrides:
        expanded, fault = _expand(override, keys, files)
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
        return [], Fault(where=where, message="a group cannot be removed; choose another of its files")
    chosen = choice if isinstance(choice, list) and group in SEVERAL else [choice]
    for one in chosen:
        if one not in files[group]:
            return [], Fault(where=where, message=f"no {group} '{one}'; {suggestion(str(one), files[group])}")
    if override.is_add():
        return [where], None
    wanted = override.get_key_element()
    matching = [key for key in keys if key == wanted or (override.package is None and key.split("@")[0] == group)]
    if not matching:
        return [], Fault(where=where, message=f"the recipe does not choose that; {suggestion(wanted, keys)}")
    told = f"[{','.join(map(str, chosen))}]" if isinstance(choice, list) else choice
    return [f"{key}={told}" for key in matching], None


def _apply(override: Override, tree: DictConfig) -> Iterator[Fault]:
    """Lays one value over the tree; a key that does not exist is left for the typed check to name."""
    key = override.key_or_group
    if override.is_delete():
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(tree, parent) if parent else tree
        if not isinstance(node, DictConfig) or last not in node:
            known = [str(name) for name in node] if isinstance(node, DictConfig) else []
            yield Fault(where=str(override.input_line), message=f"nothing to remove; {suggestion(last, known)}")
        else:
            del node[last]
        return
    try:
        OmegaConf.update(tree, key, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, AssertionError, TypeError, ValueError) as error:
        yield Fault(where=str(override.input_line), message=_first_paragraph(error))


def _written(tree: DictConfig) -> dict[str, Any]:
    """The tree as it was written, with its interpolations."""
    written = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(written, dict)
    return {str(key): value for key, value in written.items()}


def _plain(tree: DictConfig) -> tuple[dict[str, Any], list[Fault]]:
    """The tree as plain values, interpolations of its own keys resolved."""
    written: Any = _written(tree)
    faults = list(hostile(written, where=""))
    if not faults:
        try:
            with Bounded(_ENDLESS):
                written = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            faults.append(Fault(where=str(error.full_key or "recipe"), message=_first_paragraph(error)))
    assert isinstance(written, dict)
    return {str(key): value for key, value in written.items()}, faults


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{escaped}'"


def _nearest_file(error: MissingConfigException) -> str:
    """What the name in ``defaults`` may have meant."""
    missing = (error.missing_cfg_file or "").rpartition("/")[2]
    return f"; {suggestion(missing, error.options)}" if missing and error.options else ""


def _first_paragraph(error: BaseException) -> str:
    return str(error).strip().split("\n\n")[0]
