"""Tasks of lm-evaluation-harness, read from their YAML files for a plan: no code of theirs is imported or run.

A file that has ``task: NAME`` is a task, one that also has ``group: NAME`` is a group of tasks. Other files are only
included in these. As in the harness, names are looked up in all ``*.yaml`` below a folder, and a tag stands for the
tasks that have it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from alignment.core.errors import DataError
from alignment.core.files import small_text

HARNESS = "lm_eval"
"""The package of lm-evaluation-harness."""
SHIPPED = "harness:"
"""Before the name of a folder that the harness ships: ``harness:arc``."""
SKIPPED = ("__pycache__", ".ipynb_checkpoints")
"""Folders that are not read."""
NEVER_INCLUDED = "task_list"
ADDRESS = "://"
"""In the name of a data file that is on no machine of ours, such as ``hf://datasets/org/name/rows.csv``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function that a task names, ``!function utils.process_docs``, in a file of ``folder``."""

    reference: str
    folder: Path

    def __str__(self) -> str:
        """``/home/me/tasks/utils.py:process_docs``, or the reference where an installed module is meant."""
        file = self.file
        return self.reference if file is None else f"{file}:{self.reference.rpartition('.')[2]}"

    @property
    def file(self) -> Path | None:
        """The file in ``folder`` that defines it; None where an installed module is meant."""
        file = self.folder / f"{self.reference.rpartition('.')[0].replace('.', '/')}.py"
        return file if file.is_file() else None


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """A task or a group: its name, its file, and its settings with those of the files in ``included``."""

    name: str
    file: Path
    settings: Mapping[str, Any]
    included: Sequence[Path] = ()

    @property
    def is_group(self) -> bool:
        """Whether it is a group of tasks."""
        return "group" in self.settings

    @property
    def tags(self) -> list[str]:
        """The tags of a task."""
        tags = self.settings.get("tag") or []
        return [tags] if isinstance(tags, str) else list(tags)

    @cached_property
    def functions(self) -> list[Function]:
        """The functions that its settings name, in their order."""
        return list(dict.fromkeys(_functions(self.settings)))

    @property
    def sources(self) -> list[Path]:
        """The files that say what it does: its own, those that it includes, and those of its functions."""
        of_functions = (function.file for function in self.functions)
        return list(dict.fromkeys([self.file, *self.included, *(file for file in of_functions if file is not None)]))


@dataclass(frozen=True, kw_only=True)
class TaskFolders:
    """The tasks of several folders, those of one name together."""

    by_name: Mapping[str, Sequence[TaskFile]] = field(default_factory=dict)

    @cached_property
    def by_tag(self) -> dict[str, list[str]]:
        """The names of the tasks with each tag."""
        tags: dict[str, list[str]] = {}
        for name in sorted(self.by_name):
            for file in self.by_name[name]:
                for tag in file.tags if not file.is_group else ():
                    tags.setdefault(tag, []).append(name)
        return tags

    @property
    def names(self) -> list[str]:
        """Every name that a recipe may ask for."""
        return [*self.by_name, *self.by_tag]


def located(folder: str) -> Path:
    """The folder that an entry of ``task_folders`` names; it may not exist."""
    if folder.startswith(SHIPPED):
        spec = importlib.util.find_spec(HARNESS)
        roots = [] if spec is None else list(spec.submodule_search_locations or ())
        return Path(roots[0] if roots else HARNESS) / "tasks" / folder.removeprefix(SHIPPED)
    return Path(folder.removeprefix("path:")).expanduser().absolute()


def read_folder(folder: Path) -> list[TaskFile]:
    """The tasks and groups in a folder and the folders below it.

    Raises:
        DataError: a file is not YAML, or includes one that is missing.
    """
    files = (file for file in sorted(folder.glob("**/*.yaml")) if not set(SKIPPED) & set(file.parts))
    tasks = [_task_file(file) for file in files]
    return [task for task in tasks if task is not None]


def together(folders: Sequence[Sequence[TaskFile]]) -> TaskFolders:
    """The tasks of all folders."""
    by_name: dict[str, list[TaskFile]] = {}
    for task in (task for folder in folders for task in folder):
        by_name.setdefault(task.name, []).append(task)
    return TaskFolders(by_name=by_name)


def _task_file(file: Path) -> TaskFile | None:
    settings, included = read_settings(file)
    name = settings.get("group", settings.get("task"))
    return TaskFile(name=name, file=file, settings=settings, included=included) if isinstance(name, str) else None


def read_settings(file: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The settings in a file over those of the files that it includes, and these files; data files have absolute paths.

    Raises:
        DataError: a file is missing, is not YAML or not a group of settings, or includes itself.
    """
    folder = file.resolve().parent  # a link is read where it leads to, as the harness reads it
    try:
        settings = yaml.load(small_text(file), Loader=_loader(folder))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        by = f", which {including[-1]} includes" if including else ""
        raise DataError(f"cannot be read{by}: {_in_a_line(error)}", where=str(file)) from error
    if not isinstance(settings, dict):
        raise DataError("is not a group of settings", where=str(file), remedy="write a task as KEY: VALUE")
    names = settings.pop("include", [])
    merged: dict[str, Any] = {}
    included: list[Path] = []
    for name in names if isinstance(names, list) else [names]:
        other = folder / str(name)
        if other in (*including, file):
            raise DataError("includes itself", where=str(file))
        of_other, below = read_settings(other, (*including, file))
        merged |= of_other
        merged.pop(NEVER_INCLUDED, None)
        included += [other, *below]
    return merged | _with_data_files(settings, folder), included


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _loader(folder: Path) -> Any:
    class Loader(_SAFE):
        """Plain values, and ``!function`` as a ``Function``."""

    def function(loader: Any, node: yaml.Node) -> Function:
        assert isinstance(node, yaml.ScalarNode), "YAML gives a tag without a list or a mapping as a scalar"
        return Function(reference=str(loader.construct_scalar(node)), folder=folder)

    Loader.add_constructor("!function", function)
    return Loader


def _with_data_files(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with absolute paths of data files, and of a folder of data, that are given relative to ``folder``.

    The harness itself looks in the folder that it is started in, which is another one for each process.
    """
    changed = dict(settings)
    arguments = settings.get("dataset_kwargs")
    if isinstance(arguments, Mapping):
        paths = {key: _absolute(arguments[key], folder) for key in ("data_files", "data_dir") if key in arguments}
        changed["dataset_kwargs"] = {**arguments, **paths}
    source = settings.get("dataset_path")
    if isinstance(source, str) and (folder / source).is_dir():
        changed["dataset_path"] = str((folder / source).absolute())
    return changed


def _absolute(paths: Any, folder: Path) -> Any:
    if isinstance(paths, Mapping):
        return {split: _absolute(value, folder) for split, value in paths.items()}
    if isinstance(paths, list):
        return [_absolute(path, folder) for path in paths]
    if ADDRESS in str(paths):
        return paths
    return str((folder / Path(str(paths)).expanduser()).absolute())


def _functions(value: Any) -> Iterator[Function]:
    if isinstance(value, Function):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _functions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _functions(item)
