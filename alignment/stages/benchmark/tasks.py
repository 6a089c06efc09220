"""Tasks of the harness: their files, and which of them a recipe chooses."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from alignment.config.faults import suggestion
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
        return "group" in self.settings

    @property
    def tags(self) -> list[str]:
        tags = self.settings.get("tag") or []
        return [tags] if isinstance(tags, str) else list(tags)

    @cached_property
    def functions(self) -> list[Function]:
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
    tasks = []
    for file in sorted(folder.glob("**/*.yaml")):
        if not set(SKIPPED) & set(file.parts):
            settings, included = read_settings(file)
            name = settings.get("group", settings.get("task"))
            if isinstance(name, str):
                tasks.append(TaskFile(name=name, file=file, settings=settings, included=included))
    return tasks


def together(folders: Sequence[Sequence[TaskFile]]) -> TaskFolders:
    by_name: dict[str, list[TaskFile]] = {}
    for task in (task for folder in folders for task in folder):
        by_name.setdefault(task.name, []).append(task)
    return TaskFolders(by_name=by_name)


def read_settings(file: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The settings in a file over those of the files that it includes, and these files; data paths are absolute."""
    folder = file.resolve().parent  # a link is read where it leads to, as the harness reads it
    try:
        settings = yaml.load(small_text(file), Loader=_loader(folder))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        by = f", which {including[-1]} includes" if including else ""
        raise DataError(f"cannot be read{by}: {' '.join(str(error).split())}", where=str(file)) from error
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
    The harness itself looks in the folder that it is started in, which is another one for each process."""
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
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _functions(item)


BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""``dataset_path`` of data in files of this machine, which ``data_files`` names."""
_OF_GROUPS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")
_OF_DATA = ("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FALLING = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
"""Metrics of the harness of which less is better, unless a task says otherwise."""
_MEDIA = ("doc_to_image", "doc_to_audio")


class Unknown(ValueError):
    """A name that no file gives to a task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The leaves of what a recipe asks for, and the groups above them, by name."""

    tasks: Mapping[str, TaskFile]
    groups: Mapping[str, TaskFile]


def chosen(name: str, folders: TaskFolders) -> Chosen:
    """The tasks behind the name of a task or group, or a tag."""
    tasks: dict[str, TaskFile] = {}
    groups: dict[str, TaskFile] = {}
    for file in _files_of(name, folders, above=()):
        (groups if file.is_group else tasks)[file.name] = file
    return Chosen(tasks=tasks, groups=groups)


def _files_of(name: str, folders: TaskFolders, *, above: tuple[str, ...]) -> Iterator[TaskFile]:
    if name in above:
        raise Unknown(f"the group {name!r} contains itself")
    files = folders.by_name.get(name, [])
    if len(files) > 1:
        raise Unknown(f"two files are called {name!r}: {files[0].file} and {files[1].file}; rename one of them")
    if not files and name in folders.by_tag:
        for task in folders.by_tag[name]:
            yield from _files_of(task, folders, above=above)
        return
    if not files:
        raise Unknown(f"no task {name!r} in task_folders; {suggestion(name, folders.names)}")
    yield files[0]
    if files[0].is_group:
        yield from _members(files[0].name, files[0].settings, folders, above=(*above, name))


def _members(
    group: str, settings: Mapping[str, Any], folders: TaskFolders, *, above: tuple[str, ...]
) -> Iterator[TaskFile]:
    _refuse_data(group, settings, [key for key in settings if key not in _OF_GROUPS])
    members = settings.get("task") or []
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield from _files_of(member, folders, above=above)
        elif not isinstance(member, Mapping) or not ({"task", "group"} & set(member)):
            raise Unknown(f"the group {group!r} has a member that is neither a name nor a task: {member!r}")
        elif "group" in member and member["group"] not in folders.by_name:
            yield from _members(str(member["group"]), member, folders, above=above)
        else:
            _refuse_data(group, member, list(member))
            yield from _files_of(str(member.get("group", member.get("task"))), folders, above=above)


def _refuse_data(group: str, settings: Mapping[str, Any], keys: Sequence[str]) -> None:
    if data := [key for key in keys if key in _OF_DATA and settings[key] is not None]:
        raise Unknown(f"the group {group!r} sets {data[0]} for its tasks; set it in each task's own file")


def data_files(task: TaskFile) -> list[Path]:
    """The files and folders of this machine that a task reads, in a stable order."""
    names = _names_of_files(task)
    source = str(task.settings.get("dataset_path") or "")
    return [Path(name) for name in (names if names or not Path(source).is_dir() else [source])]


def _names_of_files(task: TaskFile) -> list[str]:
    arguments = task.settings.get("dataset_kwargs") or {}
    return [name for key in ("data_files", "data_dir") for name in _names(arguments.get(key))]


def _names(value: Any) -> Iterator[str]:
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]:
        if isinstance(item, (Mapping, list)):
            yield from _names(item)
        elif item is not None:
            yield str(item)


def hub_source(task: TaskFile) -> str | None:
    """``hub:ORG/NAME@REVISION`` for a task whose data set is a hub's, otherwise None."""
    source = str(task.settings.get("dataset_path") or "")
    if source in BUILDERS or Path(source).is_dir() or not _REPOSITORY.fullmatch(source):
        return None
    revision = (task.settings.get("dataset_kwargs") or {}).get("revision") or "main"
    return f"hub:{source}@{revision}"


def falling(task: TaskFile) -> list[str]:
    """The task's metrics of which less is better; without a list of metrics, those that a task may have by default."""
    metrics = task.settings.get("metric_list")
    if not isinstance(metrics, list):
        return list(_FALLING)
    listed = [metric for metric in metrics if isinstance(metric, Mapping) and isinstance(metric.get("metric"), str)]
    return [m["metric"] for m in listed if not m.get("higher_is_better", m["metric"] not in _FALLING)]


def problems(task: TaskFile, *, num_fewshot: int | None) -> Iterator[str]:
    settings = task.settings
    if "class" in settings:
        yield "is written in Python (class), which is not supported; write it as YAML, with functions where needed"
    if settings.get("unsafe_code"):
        yield "runs programs that a model wrote (unsafe_code), which this stage never does"
    if media := [key for key in _MEDIA if settings.get(key)]:
        yield f"shows a model more than text ({media[0]}), which this stage does not support"
    if not (settings.get("test_split") or settings.get("validation_split")):
        yield "does not say which rows to use; set test_split or validation_split"
    metrics = settings.get("metric_list") or []
    for metric in metrics if isinstance(metrics, list) else []:
        if isinstance(metric, Mapping) and metric.get("hf_evaluate"):
            yield (
                f"loads the metric {metric.get('metric')!r} from a hub (hf_evaluate), but stages have no network; use "
                "a metric of the harness, or !function"
            )
    answers = settings.get("generation_kwargs") or {}
    if answers.get("do_sample") and float(answers.get("temperature") or 0.0) > 0.0:
        yield "samples its answers, but this stage decodes greedily; set do_sample: false in its generation_kwargs"
    if num_fewshot and settings.get("num_fewshot") == 0:
        yield (
            "sets num_fewshot: 0 in its file, which the harness never overrides; remove that line, or leave the "
            "stage's num_fewshot at null"
        )
    yield from _data_problems(task)


def _data_problems(task: TaskFile) -> Iterator[str]:
    source = task.settings.get("dataset_path")
    if task.settings.get("custom_dataset") is not None:
        return
    if source is None:
        yield "does not name its data; set dataset_path, such as json with data_files"
    elif source in BUILDERS and not data_files(task):
        yield f"reads {source} but does not name a file; set dataset_kwargs: {{data_files: …}}"
    elif addresses := [name for name in _names_of_files(task) if ADDRESS in name]:
        yield f"reads {addresses[0]}, but stages have no network; download the file and name it in data_files"
    elif hub_source(task) is not None and _names_of_files(task):
        yield (
            f"chooses files of the hub's data set {source} (data_files, data_dir), which this stage does not "
            f"support; download them, and set dataset_path to their format, such as csv"
        )
    elif source not in BUILDERS and not Path(str(source)).is_dir() and hub_source(task) is None:
        yield (
            f"has dataset_path {source!r}, which is not a folder relative to the task's file; give a folder, one of "
            f"{', '.join(BUILDERS)} with data_files, or ORG/NAME of a hub"
        )
