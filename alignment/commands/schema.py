"""``align schema``: the JSON Schema of recipes or sweeps, for editors."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from alignment.config import yaml_file
from alignment.config.class_schemas import DRAFT, ClassSchemas, Schema, described
from alignment.config.model import AdapterConfig
from alignment.config.rules import NAME
from alignment.config.run import GROUPS, SEVERAL, RunConfig, conf_folder, recipe_names, recipes_folder
from alignment.config.stage import StageConfig
from alignment.config.sweep import ObjectiveConfig, ParameterConfig, SweepConfig
from alignment.core.errors import ConfigError
from alignment.pipeline.plan.short_form import USE, long_form
from alignment.stages.registry import config_classes

FILES = ("recipe", "sweep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which kind of file to describe."""
    parser.description = (
        "Prints the JSON Schema of recipes or of sweeps, with which an editor completes and checks them as you type."
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", choices=FILES, default=FILES[0], help="recipe (default) or sweep"
    )
    parser.add_argument(
        "--beside",
        metavar="FOLDER",
        help="the folder of your recipes; the schema then also allows the files in its adapter/, launch/, stage/ "
        "and so on",
    )


def handle(console: Console, arguments: argparse.Namespace) -> int:
    """Prints the schema; returns the exit code."""
    return show_schema(console, arguments.file, beside=arguments.beside)


def show_schema(console: Console, file: str, *, beside: str | None = None) -> int:
    """Prints the schema of a ``recipe`` or a ``sweep``; returns the exit code. Raises ConfigError."""
    folders = []
    if beside is not None:
        if file != "recipe":
            raise ConfigError("a sweep does not choose files", where="--beside", remedy="leave it out")
        if not Path(beside).expanduser().is_dir():
            raise ConfigError(f"no folder {beside}", where="--beside", remedy="name the folder of your recipes")
        folders = [Path(beside).expanduser()]
    schema = recipe_schema(folders) if file == "recipe" else sweep_schema()
    console.print(json.dumps(schema, indent=1, ensure_ascii=False), markup=False, highlight=False, soft_wrap=True)
    return 0


_STAGE = "stage"
_STAGE_KEY = re.compile(r"stage@stages\.([^.]+)")

_GROUP_KEY = r"^((override|optional) )?/?{}(@[^@:\s]+)?$"
"""A pattern of ``adapter``, ``adapter@stages.sft.adapter`` and ``override /adapter@stages.sft.adapter``."""
_ANY_STAGE = {"$ref": "#/definitions/stage"}


def recipe_schema(folders: Sequence[Path] = ()) -> Schema:
    """What ``align run`` reads; files of groups in ``folders`` may be chosen beside those of ``conf/``."""
    schemas = ClassSchemas(interpolations=True, known={StageConfig: _ANY_STAGE})
    classes = config_classes()
    fields = schemas.fields(RunConfig)
    known = _known_stages(folders)
    # None is required, because ``defaults`` may have them from another recipe; ``allOf`` has those of known names.
    needed = {key: value for key, value in fields["stages"].items() if key != "minProperties"}
    fields["stages"] = {**needed, "properties": {name: {} for name in known}, "propertyNames": dict(NAME.keywords)}
    schemas.definitions["stage"] = any_stage = schemas.by_kind(classes)
    of_kinds = {kind: schemas.of(cls) for kind, cls in classes.items()}
    stages = [schemas.definitions[reference["$ref"].rpartition("/")[2]] for reference in of_kinds.values()]
    for definition in (any_stage, any_stage["else"], *stages):
        definition["type"] = [*definition["type"], "null"]
        definition.setdefault("properties", {})[USE] = {"enum": list(_files(_STAGE, folders))}
    for group in ("adapter", "launch", "model", "tracking"):
        _allow_choice(schemas.definitions[GROUPS[group].__name__], group, folders)  # type: ignore[attr-defined]
    return {
        "$schema": DRAFT,
        "title": "a recipe of align",
        "type": "object",
        "description": described(RunConfig),
        "properties": {"defaults": _defaults(folders), "adapter": schemas.of(AdapterConfig), **fields},
        "additionalProperties": False,
        "allOf": [_stage_named(name, kinds, of_kinds) for name, kinds in known.items()],
        "definitions": schemas.definitions,
    }


def _defaults(folders: Sequence[Path]) -> Schema:
    """The list of files to start from; a name may also be that of a file beside the recipe."""
    return {
        "description": (
            "Not needed. Files to start from: base, a file for each stage (stage@stages.NAME: FILE), and _self_ last. "
            "'override /GROUP: FILE' replaces a choice of an earlier entry."
        ),
        "type": "array",
        "items": {
            "type": ["string", "object"],
            "anyOf": [{"enum": ["base", "_self_", *recipe_names()]}, {"type": "string"}, {"type": "object"}],
            "patternProperties": {_GROUP_KEY.format(re.escape(group)): _choice(group, folders) for group in GROUPS},
            "additionalProperties": False,
            "maxProperties": 1,
        },
    }


def _allow_choice(definition: Schema, group: str, folders: Sequence[Path]) -> None:
    """Lets a group of settings be the name of a file, or start from one by ``use``; a model may be any source."""
    names = list(_files(group, folders))
    definition["properties"][USE] = {"enum": names}
    definition["pattern"] += "|." if group == "model" else f"|^({'|'.join(map(re.escape, names))})$"
    if group in SEVERAL:
        definition |= {"type": [*definition["type"], "array"], "items": {"enum": names}}


def _choice(group: str, folders: Sequence[Path]) -> Schema:
    file: Schema = {"enum": list(_files(group, folders))}
    return {"anyOf": [file, {"type": "array", "items": file}]} if group in SEVERAL else file


def _files(group: str, folders: Sequence[Path]) -> dict[str, Path]:
    """The files of a group by name; a shipped one goes before one that lies beside the recipe."""
    paths = [path for folder in (*folders, conf_folder()) for path in sorted((folder / group).glob("*.yaml"))]
    return {path.stem: path for path in paths}


def _known_stages(folders: Sequence[Path]) -> dict[str, dict[str, list[str]]]:
    """For each known name of a stage: the kinds that it may have, and the files that make it of each kind."""

    def content(path: Path) -> Mapping[str, Any]:
        read = yaml_file.read(path)
        return read if isinstance(read, dict) else {}

    kind_of_file = {name: str(content(path).get("kind", "")) for name, path in _files(_STAGE, folders).items()}
    used = {(name, kind_of_file[name]) for name in kind_of_file}
    for recipe in recipe_names():
        entries = long_form(content(recipes_folder() / f"{recipe}.yaml"), recipes_folder())["defaults"]
        choices = [choice for entry in entries if isinstance(entry, dict) for choice in entry.items()]
        named = [(match[1], str(file)) for key, file in choices if (match := _STAGE_KEY.fullmatch(key))]
        used |= {(name, kind_of_file[file]) for name, file in named if file in kind_of_file}
    known: dict[str, dict[str, list[str]]] = {}
    for name, kind in sorted(used):
        known.setdefault(name, {})[kind] = [file for file, own in kind_of_file.items() if own == kind]
    return known


def _stage_named(name: str, kinds: Mapping[str, list[str]], of_kinds: Mapping[str, Schema]) -> Schema:
    """The stage of this name has the kind of the file that ``defaults`` choose for it, else the one that it says, else
    the one that it is called after."""

    def stage_is(schema: Schema) -> Schema:
        return {"properties": {"stages": {"properties": {name: schema}}}}

    schema = stage_is(_ANY_STAGE)
    if name in of_kinds:
        says_no_kind = {"not": {"anyOf": [{"required": [key]} for key in ("kind", USE)]}}
        is_short = {"not": {"required": ["defaults"]}, **stage_is({"type": ["object", "null"], **says_no_kind})}
        schema = {"if": is_short, "then": stage_is(of_kinds[name]), "else": schema}
    for kind, files in kinds.items():
        if kind in of_kinds:
            key = f"{_STAGE}@stages.{name}"
            entry = {"type": "object", "required": [key], "properties": {key: {"enum": files}}}
            chosen = {"required": ["defaults"], "properties": {"defaults": {"type": "array", "contains": entry}}}
            schema = {"if": chosen, "then": stage_is(of_kinds[kind]), "else": schema}
    return schema


def sweep_schema() -> Schema:
    """What ``align sweep`` reads. Hydra does not read the file, so nothing in it is interpolated."""
    schemas = ClassSchemas(interpolations=False)
    fields = schemas.fields(SweepConfig)
    several = fields["objective"]
    fields["objective"] = {
        "description": several["description"],
        "if": {"type": "array"},
        "then": {"items": several["items"]},
        "else": schemas.of(ObjectiveConfig),
    }
    parameter = schemas.definitions[ParameterConfig.__name__]
    parameter["required"] = ["key"]
    values = parameter["properties"]["values"]
    values["items"] = {}  # numbers and lists are written as they are in a recipe
    return {
        "$schema": DRAFT,
        "title": "a sweep of align",
        **schemas.group(fields, described(SweepConfig)),
        "required": ["parameters"],
        "definitions": schemas.definitions,
    }
