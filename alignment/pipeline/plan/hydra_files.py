"""Initialises Hydra for one composition, in which each file is checked before Hydra acts on it.

A file that a recipe includes has its own defaults list, whose interpolations Hydra resolves while it composes. The
composed tree no longer shows them, and an error would print the values that they resolved to.

Hydra has one state for the whole process. A caller from Python may use Hydra for a program of its own, so that state is
restored, and threads compose one after another.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.version import VersionBase
from omegaconf import OmegaConf

from alignment.config import yaml_file
from alignment.config.faults import Fault, refuse
from alignment.config.run import conf_folder, recipes_folder
from alignment.config.stage import StageClasses
from alignment.config.typed import convert
from alignment.pipeline.plan.short_form import long_form

_TOKEN = re.compile(r"\$\{|[{}:]")


def hostile(value: Any, *, where: str) -> Iterator[Fault]:
    """A fault for each such key and value in ``value``, at any depth."""
    if isinstance(value, dict):
        for key, item in value.items():
            path = f"{where}.{key}" if where else str(key)
            if str(key).split(".")[-1] == "_target_":
                message = "'_target_' is not allowed: a configuration contains data and never runs code"
                yield Fault(where=path, message=message)
            if _has_resolver(str(key)):
                yield _reads_outside(str(key), where)
            yield from hostile(item, where=path)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from hostile(item, where=f"{where}[{number}]")
    elif isinstance(value, str) and _has_resolver(value):
        yield _reads_outside(value, where)


def _reads_outside(text: str, where: str) -> Fault:
    message = f"{text!r} is not allowed: a configuration can only refer to itself; use ${{other.key}} or the value"
    return Fault(where=where, message=message)


def _has_resolver(text: str) -> bool:
    """Whether the text may contain ``${name:…}``, even with an interpolated name: a colon inside such braces."""
    depth = 0
    for token in _TOKEN.findall(text):
        if token == ":" and depth:
            return True
        if token == "}":
            depth = max(0, depth - 1)
        elif token == "${" or (token == "{" and depth):
            depth += 1
    return False


def wrong_shapes(content: Mapping[str, Any], classes: StageClasses) -> list[Fault]:
    """The faults in values that are a list or a group, in the ``content`` of one recipe file. The kind of a stage that
    the file does not name is taken from its defaults (``stage@stages.mine: sft``), or from the stage's name."""
    tree = {key: value for key, value in content.items() if key != "defaults"}
    if isinstance(stages := tree.get("stages"), Mapping):
        groups = [entry for entry in content.get("defaults") or () if isinstance(entry, Mapping)]
        kinds = {str(key).rpartition("@stages.")[2]: kind for entry in groups for key, kind in entry.items()}
        named = {name: {"kind": kinds.get(name, name), **of} for name, of in stages.items() if isinstance(of, Mapping)}
        tree["stages"] = {name: group for name, group in named.items() if group["kind"] in classes}
        tree["stages"] |= {name: group for name, group in stages.items() if isinstance(group, list)}

    def at(where: str) -> Any:
        value: Any = content
        for key in where.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    return [fault for fault in convert(tree, classes)[1] if isinstance(at(fault.where), (list, Mapping))]


_HYDRA = "1.3"
_IN_USE = threading.RLock()
_READ: dict[tuple[object, ...], ConfigResult] = {}
"""Files as they were read, by name and state: a sweep composes the same ones for every trial."""


class Files:
    """The files of one composition. A name means the shipped file; those beside the recipe add names. ``name`` is what
    Hydra calls the ``recipe``, which no file can be called. ``unread`` are files beside the recipe that have the name
    of a shipped one."""

    def __init__(self, recipe: Path) -> None:
        self.recipe = recipe
        self.name = f"recipe {recipe.name}"
        self.unread: dict[Path, None] = {}
        self._read: list[Path] = []

    @property
    def search(self) -> str:
        """The override that makes Hydra look beside the recipe after it looked at the shipped files."""
        return f"hydra.searchpath=[{_quoted(recipes_folder())},{_quoted(self.recipe.parent)}]"

    def in_circle(self) -> list[Path]:
        """The files beside the recipe that include each other, and those that lead to them."""
        included = {path: _included(path) for path in self._read}
        while ends := [path for path in included if not included[path] & {other.stem for other in included}]:
            included = {path: names for path, names in included.items() if path not in ends}
        return list(included)

    def note(self, name: str, path: Path) -> None:
        """Notes that a file was read under this name."""
        beside = self.recipe.parent / f"{name}.yaml"
        if path == beside:
            self._read.append(path)
        elif beside != self.recipe and beside.is_file():
            self.unread[beside] = None


class _CheckedFiles(FileConfigSource):
    files: ClassVar[Files]

    def is_config(self, config_path: str) -> bool:
        return config_path == self.files.name or bool(super().is_config(config_path))

    def load_config(self, config_path: str) -> ConfigResult:
        is_recipe = config_path == self.files.name
        path = self.files.recipe if is_recipe else Path(self.path) / self._normalize_file_name(config_path)
        if not path.is_file():
            return super().load_config(config_path)
        if not is_recipe:
            self.files.note(config_path, path)
        state = path.stat()
        key = (self.provider, path, state.st_ino, state.st_size, state.st_mtime_ns)
        if key not in _READ:
            content = yaml_file.read(path)
            faults = hostile(content.get("defaults") if isinstance(content, dict) else None, where="defaults")
            refuse([Fault(where=f"{path}: {fault.where}", message=fault.message) for fault in faults])
            _READ[key] = super().load_config(str(path))
        read = copy.deepcopy(_READ[key])  # Hydra changes what it gets
        if path.parent in (self.files.recipe.parent, recipes_folder()):
            plain: Any = OmegaConf.to_container(read.config, resolve=False)
            read.config = OmegaConf.create(dict(long_form(plain, path.parent)))  # also depends on files beside it
        return read


@contextmanager
def composing(recipe: Path) -> Iterator[Files]:
    """Initialises Hydra for a recipe; its files are read through the class above."""
    with _IN_USE:
        Plugins.instance()  # registers Hydra's own class first
        instance, version = GlobalHydra.instance(), VersionBase.instance()
        sources, scheme = SourcesRegistry.instance().types, FileConfigSource.scheme()
        hydra, version_base, source = instance.hydra, version.getbase(), sources[scheme]
        instance.clear()
        sources[scheme] = _CheckedFiles
        _CheckedFiles.files = Files(recipe)
        try:
            with initialize_config_dir(config_dir=str(conf_folder()), version_base=_HYDRA):
                yield _CheckedFiles.files
        finally:
            sources[scheme] = source
            version.version_base = version_base
            instance.hydra = hydra
            GlobalHydra.set_instance(instance)  # Hydra put a copy in its place


def _included(path: Path) -> set[str]:
    content = yaml_file.read(path)
    defaults = content.get("defaults") if isinstance(content, dict) else None
    names: set[str] = set()
    for entry in defaults if isinstance(defaults, list) else ():
        files = entry.values() if isinstance(entry, dict) else [entry]
        names |= {Path(str(file).partition("@")[0]).stem for file in files}
    return names


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'file://{escaped}'"
