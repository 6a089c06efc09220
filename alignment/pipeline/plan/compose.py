"""Composes a recipe and its overrides into one plain tree, with Hydra.

Hydra merges the files. Values from the command line are applied to the result here, one by one, so that every
misspelling is reported, not only the first. Nothing in a configuration can run code or read the environment:
``_target_`` and resolvers are refused.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignment.config import yaml_file
from alignment.config.faults import Fault, refuse, suggestion
from alignment.config.launch import MachinesBackend, SlurmBackend
from alignment.config.run import recipe_names, recipes_folder, sweep_names
from alignment.core.deadline import Bounded
from alignment.core.errors import ConfigError
from alignment.data.row_files import is_named_as_data
from alignment.data.source_files import similar_name
from alignment.pipeline.plan import choices
from alignment.pipeline.plan.choices import chosen_files, copy_groups, passes_reference
from alignment.pipeline.plan.hydra_files import composing, hostile, wrong_shapes
from alignment.pipeline.plan.overrides import leaves, parse
from alignment.pipeline.plan.profile import Profile
from alignment.pipeline.plan.short_form import long_form, long_override, names_model, written_faults
from alignment.stages import registry

_CONFUSED = "Cannot merge DictConfig with ListConfig"
_ENDLESS = ConfigError("its interpolations expand to more than can be written", where="recipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """The tree of files and overrides, not yet typed, and the ``faults`` so far. ``written`` are the dotted keys that
    the user's file sets and no override changes; ``names_model``: a recipe or an override names the base model;
    ``dropped_gates``: stages whose gates the ``profile`` removed; ``unread``: files beside the recipe with names of
    shipped files."""

    recipe: str
    tree: dict[str, Any]
    faults: list[Fault]
    written: frozenset[str] = frozenset()
    profile: str = ""
    dropped_gates: tuple[str, ...] = ()
    names_model: bool = True
    unread: tuple[Path, ...] = ()

    def placed(self, fault: Fault) -> Fault:
        """The fault, with the recipe's file in front if the user's recipe sets the faulty key."""
        return replace(fault, where=f"{self.recipe}: {fault.where}") if fault.where in self.written else fault


def compose(recipe: str, overrides: Sequence[str]) -> Composition:
    """Composes a shipped recipe by name, or a user's by path. Raises ConfigError: there is no such recipe, or its files
    do not compose."""
    path = find_recipe(recipe)
    _check_recipe_text(path)
    parsed, faults = parse([long_override(text, path.parent) for text in overrides])
    files = _files(path, parsed)
    tree, profile, choice_faults = files.tree, files.profile, files.faults
    values = [o for o in parsed if not choices.is_group(o) and not choices.is_profile(o)]
    changed = [] if profile is None else [key for key, _ in leaves(profile.changes(_written(tree)))]
    gated = []
    with Bounded(_ENDLESS):
        if profile is not None:
            for key in changed:
                copy_groups(tree, key)
            written = _written(tree)
            gated = _gated(written)
            tree = OmegaConf.create(profile.applied_to(written, processes=_processes(profile, values, written)))
        # A group that refers to another one gets its own settings last, so that it has all of the other's.
        in_order = sorted(values, key=lambda o: passes_reference(tree, o.key_or_group))
        value_faults = [fault for o in in_order for fault in _apply(o, tree)]
    plain, plain_faults = _plain(tree)
    if not plain_faults:
        changed += [key for o in values if not o.is_delete() for key, _ in leaves({o.key_or_group: o.value()})]
        choice_faults += choices.faults(files.chosen, plain, changed=changed)
    plain.setdefault("name", path.stem)
    if profile is not None and isinstance(plain["name"], str):
        plain["name"] = profile.named(plain["name"])
    keys, changed_keys = _keys_written(path), {o.key_or_group for o in parsed}
    return Composition(
        recipe=recipe,
        tree=plain,
        faults=[*faults, *choice_faults, *value_faults, *plain_faults],
        written=frozenset() if recipe in recipe_names() else keys - changed_keys,
        profile="" if profile is None else profile.name,
        dropped_gates=tuple(name for name in gated if name not in _gated(plain)),
        names_model=names_model(yaml_file.read(path)) or not changed_keys.isdisjoint({"model", "model.source"}),
        unread=files.unread,
    )


def tree_of(overrides: Sequence[str], *, example: str) -> tuple[dict[str, Any], list[Fault]]:
    """The tree that these overrides make without any file, not yet typed, and the faults in them. ``example`` is an
    override that is allowed."""
    parsed, faults = parse(overrides, example=example)
    tree = OmegaConf.create({})
    value_faults = [fault for override in parsed for fault in _apply(override, tree)]
    plain, plain_faults = _plain(tree)
    return plain, [*faults, *value_faults, *plain_faults]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """A recipe's files merged with the chosen ones, the profile, the files that the command line chooses, the files
    that are ``unread`` because shipped ones have their names, and the faults in the choices."""

    tree: DictConfig
    profile: Profile | None
    chosen: dict[str, Mapping[str, Any]]
    unread: tuple[Path, ...]
    faults: list[Fault]


def _files(path: Path, overrides: Sequence[Override]) -> _Files:
    with composing(path) as files:
        search = files.search
        try:
            asked = [o for o in overrides if choices.is_profile(o)]
            profile, profile_faults = choices.profile(files, asked)
            chosen = choices.with_profile([o for o in overrides if choices.is_group(o)], profile)
            groups, group_faults = choices.expanded(files, chosen)
            tree = hydra_compose(config_name=files.name, overrides=[search, *groups])
            backend = choices.backend(search, groups)
            of_user = chosen_files(search, groups, overrides)
        except MissingConfigException as error:
            missing = (error.missing_cfg_file or "").rpartition("/")[2]
            hint = f"; {suggestion(missing, error.options)}" if missing and error.options else ""
            raise ConfigError(f"{_first_paragraph(error)}{hint}", where=str(path)) from error
        except RecursionError:
            files_in_circle = ", ".join(map(str, files.in_circle()))
            message = f"these files include each other without an end: {files_in_circle}"
            remedy = "remove one of these names from the list 'defaults' of a file"
            raise ConfigError(message, where=str(path), remedy=remedy) from None
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            if _CONFUSED in str(error):
                shape_faults = wrong_shapes(yaml_file.read(path), registry.config_classes())
                refuse([replace(fault, where=f"{path}: {fault.where}") for fault in shape_faults])
            raise ConfigError(_first_paragraph(error), where=str(path)) from error
    OmegaConf.set_struct(tree, False)
    if backend is not None:
        OmegaConf.update(tree, "launch.backend", backend, merge=False)
    return _Files(
        tree=tree,
        profile=profile,
        chosen=of_user,
        unread=tuple(sorted(files.unread)),
        faults=[*profile_faults, *group_faults],
    )


def _keys_written(path: Path) -> frozenset[str]:
    def keys(tree: Any, prefix: str) -> Iterator[str]:
        for key, value in tree.items() if isinstance(tree, dict) else ():
            yield f"{prefix}{key}"
            yield from keys(value, f"{prefix}{key}.")

    return frozenset(keys(long_form(yaml_file.read(path), path.parent), ""))


def find_recipe(recipe: str) -> Path:
    """The file of a recipe. Raises ConfigError: there is no such name or file, or it is that of a sweep; the error
    lists the shipped recipes."""
    if is_named_as_data(Path(recipe)):
        remedy = f"align new {shlex.quote(recipe)} writes a recipe for it; align doctor shows what it contains"
        raise ConfigError("has the name of a data file; a recipe is a .yaml file", where=recipe, remedy=remedy)
    if recipe.endswith((".yaml", ".yml")) or "/" in recipe:
        path = Path(recipe).expanduser().absolute()
        if not path.is_file():
            shipped = f"shipped recipes: {', '.join(recipe_names())}"
            raise ConfigError(f"no file {path}", where=recipe, remedy=similar_name(path) or shipped)
        if path.suffix != ".yaml":
            raise ConfigError("does not end in .yaml", where=recipe, remedy="rename it")
        return path
    if recipe not in recipe_names():
        if recipe in sweep_names():
            raise _sweep(recipe, where=recipe)
        remedy = "`align recipes` lists them; give your own file by its path, such as ./mine.yaml"
        raise ConfigError(f"no recipe of this name; {suggestion(recipe, recipe_names())}", where=recipe, remedy=remedy)
    return recipes_folder() / f"{recipe}.yaml"


def _check_recipe_text(path: Path) -> None:
    """Refuses what Hydra would act on while it composes, before the composed tree can be checked."""
    content = yaml_file.read(path)
    if not isinstance(content, dict):
        raise ConfigError("a recipe is a group of settings", where=str(path), remedy="start it with: stages:")
    if "parameters" in content and not {"defaults", "stages"} & content.keys():
        raise _sweep(str(path), where=str(path))
    faults = list(hostile(content, where="")) or list(written_faults(content, path.parent))
    if "hydra" in content:
        faults.append(Fault(where="hydra", message="Hydra's own settings are not allowed"))
    defaults = content.get("defaults", [])
    if isinstance(defaults, list) and "_self_" in defaults[:-1]:
        faults.append(Fault(where="defaults", message="'_self_' must come last, or the recipe's own values are lost"))
    refuse(faults)


def _sweep(sweep: str, *, where: str) -> ConfigError:
    return ConfigError(
        f"{Path(sweep).stem!r} is a sweep, which tries settings on a recipe; it is not a recipe",
        where=where,
        remedy=f"name its recipe: `align plan RECIPE` plans a single run, and `align sweep RECIPE {sweep}` plans every "
        f"value before it runs the trials",
    )


def _processes(profile: Profile, overrides: list[Override], tree: Mapping[str, Any]) -> int:
    launch = tree.get("launch")
    values = {key: value for key, value in leaves(launch, "launch.") if key.startswith("launch.backend.")}
    values |= dict(leaves(profile.values.get("launch"), "launch."))
    values |= {override.key_or_group: override.value() for override in overrides if not override.is_delete()}
    numbers = [values.get("launch.num_processes", 1)]
    for backend in (MachinesBackend(), SlurmBackend()):
        if values.get("launch.backend.kind") == backend.kind:
            numbers.append(values.get("launch.backend.num_machines", backend.num_machines))
    return math.prod(number for number in numbers if type(number) is int and number > 0)


def _apply(override: Override, tree: DictConfig) -> Iterator[Fault]:
    key = override.key_or_group
    copy_groups(tree, key)
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
        value, old = override.value(), OmegaConf.select(tree, key)
        # A list in place of a group, or the reverse, replaces it; the typed check says what is allowed.
        other_shape = list if isinstance(old, DictConfig) else dict if isinstance(old, ListConfig) else ()
        OmegaConf.update(tree, key, value, merge=not isinstance(value, other_shape), force_add=True)
    except (OmegaConfBaseException, AssertionError, TypeError, ValueError) as error:
        yield Fault(where=str(override.input_line), message=_first_paragraph(error))


def _written(tree: DictConfig) -> dict[str, Any]:
    written = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(written, dict)
    return {str(key): value for key, value in written.items()}


def _gated(tree: Mapping[str, Any]) -> list[str]:
    stages = tree.get("stages")
    named = stages.items() if isinstance(stages, Mapping) else ()
    return [str(name) for name, stage in named if isinstance(stage, Mapping) and stage.get("gate")]


def _plain(tree: DictConfig) -> tuple[dict[str, Any], list[Fault]]:
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


def _first_paragraph(error: BaseException) -> str:
    return str(error).strip().split("\n\n")[0]
