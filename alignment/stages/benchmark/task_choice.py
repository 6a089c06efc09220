"""The tasks that a recipe asks for, and what in them a run cannot do: checked while planning, without the harness."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config.faults import suggestion
from alignment.stages.benchmark.task_files import ADDRESS, TaskFile, TaskFolders

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
    """The tasks behind a name: of a task, of a group, or a tag.

    Raises:
        Unknown: there is no such name, two files have it, or a group is defined in a way that is not supported; the
            message says which.
    """
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
    """What in a task cannot be done, a sentence each."""
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
