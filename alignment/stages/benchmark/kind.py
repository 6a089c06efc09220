"""The stage kind ``benchmark``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.config.faults import Fault
from alignment.config.run import RunConfig
from alignment.core.errors import DataError
from alignment.core.fingerprint import content_sha256, digest, file_sha256
from alignment.stages.base import LaunchShape, OtherFiles, Outcome, References, Reported, RunsOn, StageKind
from alignment.stages.benchmark.benchmark_tables import lines, tables
from alignment.stages.benchmark.config import BenchmarkConfig
from alignment.stages.benchmark.task_choice import Chosen, Unknown, chosen, data_files, falling, hub_source, problems
from alignment.stages.benchmark.task_files import (
    HARNESS,
    SHIPPED,
    SKIPPED,
    TaskFile,
    TaskFolders,
    located,
    read_folder,
    together,
)

INSTALL = "pip install 'lm_eval>=0.4.13,<0.4.14'"
_RELEASE = "0.4.13"


def _installed() -> str | None:
    """The version of the harness."""
    try:
        return metadata.version(HARNESS)
    except metadata.PackageNotFoundError:
        return None


def _folders(names: Sequence[str]) -> TaskFolders:
    """The tasks in ``task_folders``."""
    return together([read_folder(located(name)) for name in names])


def selected(config: BenchmarkConfig) -> Chosen:
    """The tasks that the stage runs, and their groups.

    Raises:
        DataError: a file of a task cannot be read.
        Unknown: there is no such task.
    """
    folders = _folders(config.task_folders)
    parts = [chosen(name, folders) for name in config.tasks]
    return Chosen(
        tasks={name: task for part in parts for name, task in part.tasks.items()},
        groups={name: group for part in parts for name, group in part.groups.items()},
    )


def _known(config: BenchmarkConfig) -> Chosen:
    """The tasks, or none if a name or a file is wrong, which is a fault of the plan."""
    try:
        return selected(config)
    except (Unknown, DataError):
        return Chosen(tasks={}, groups={})


# ---- faults ----------------------------------------------------------------------------------------------------------


def _faults(config: BenchmarkConfig, run: RunConfig, where: str) -> Iterator[Fault]:
    version = _installed()
    if version is None or f"{version}.".partition(f"{_RELEASE}.")[0]:
        reason = "is not installed" if version is None else f"has version {version}, and this stage needs {_RELEASE}"
        yield Fault(where=f"{where}.kind", message=f"lm-evaluation-harness {reason}; {INSTALL}")
    if not config.tasks:
        yield Fault(where=f"{where}.tasks", message="is empty; list names of tasks, groups or tags in task_folders")
    folder_faults = [*_folder_faults(config, Path(run.output).expanduser().absolute(), where)]
    yield from folder_faults
    if not folder_faults:
        yield from _task_faults(config, _folders(config.task_folders), where)


def _folder_faults(config: BenchmarkConfig, output: Path, where: str) -> Iterator[Fault]:
    if not config.task_folders:
        message = f"is empty; list folders with the tasks' YAML files, or {SHIPPED}NAME for one that the harness ships"
        yield Fault(where=f"{where}.task_folders", message=message)
    for number, name in enumerate(config.task_folders):
        path, folder = f"{where}.task_folders[{number}]", located(name)
        if not folder.is_dir():
            yield Fault(where=path, message=f"no folder {folder}")
            continue
        if output.is_relative_to(folder):
            message = (
                f"{folder} also contains this run's output, so its content changes; put tasks in a separate folder"
            )
            yield Fault(where=path, message=message)
            continue
        try:
            tasks = _folders([name]).by_name
        except DataError as error:
            yield Fault(where=path, message=str(error))
            continue
        if not tasks:
            yield Fault(where=path, message=f"{folder} has no task: no *.yaml file in it has task: NAME")


def _task_faults(config: BenchmarkConfig, folders: TaskFolders, where: str) -> Iterator[Fault]:
    first: dict[str, str] = {}
    for number, name in enumerate(config.tasks):
        path = f"{where}.tasks[{number}]"
        try:
            tasks = chosen(name, folders).tasks
        except Unknown as error:
            yield Fault(where=path, message=str(error))
            continue
        for task in tasks.values():
            if task.name in first:
                message = (
                    f"{name!r} contains the task {task.name!r}, and so does {first[task.name]!r}; list it only once"
                )
                yield Fault(where=path, message=message)
            first[task.name] = name
            for problem in problems(task, num_fewshot=config.num_fewshot):
                yield Fault(where=path, message=f"{task.name!r} ({task.file}) {problem}")


def _reference_faults(config: BenchmarkConfig, where: str) -> Iterator[Fault]:
    for number, arm in enumerate(config.arms):
        if arm in (PROMPTED, FEW_SHOT):
            message = (
                f"{arm!r} changes prompts, but here the prompts belong to the tasks; use 'base', and "
                f"num_fewshot for examples"
            )
            yield Fault(where=f"{where}.arms[{number}]", message=message)


# ---- files -----------------------------------------------------------------------------------------------------------


def _located(config: BenchmarkConfig) -> BenchmarkConfig:
    folders = [name if name.startswith(SHIPPED) else str(located(name)) for name in config.task_folders]
    return replace(config, task_folders=folders)


def content(config: BenchmarkConfig, where: str) -> Mapping[str, str]:
    """The harness's version, and the SHA-256 of each folder of tasks. What tasks read elsewhere is covered too: data,
    included files, and the files of functions.

    Raises:
        DataError: a data file is missing.
    """
    folders = [located(name) for name in config.task_folders]
    hashes = {f"task_folders[{n}]": _tree_sha256(folder) for n, folder in enumerate(folders) if folder.is_dir()}
    known = _known(config)
    for task in known.tasks.values():
        files = data_files(task)
        for file in files:
            if not file.exists():
                remedy = f"{task.file} names it; paths are relative to the file that names them"
                raise DataError("no such file", where=f"{where}.tasks: {task.name}: {file}", remedy=remedy)
        if outside := _outside(files, folders):
            hashes[f"data of {task.name}"] = digest([content_sha256(file) for file in outside])
    for task in (*known.tasks.values(), *known.groups.values()):
        if outside := _outside(task.sources, folders):
            hashes[f"files of {task.name}"] = digest([file_sha256(file) for file in outside])
    return {"lm_eval": _installed() or "", **hashes}


def _outside(files: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    """The files that the hash of no folder covers."""
    return [file for file in files if not any(_covers(folder.resolve(), file.resolve()) for folder in folders)]


def _covers(folder: Path, file: Path) -> bool:
    return file.is_relative_to(folder) and not _is_by_product(file.relative_to(folder))


def _tree_sha256(folder: Path) -> str:
    """The content of all files below a folder, with their names; what Python or an editor leaves there is left out."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return digest({name.as_posix(): file_sha256(file) for name, file in files.items() if not _is_by_product(name)})


def _is_by_product(name: Path) -> bool:
    return any(part.startswith(".") or part in SKIPPED for part in name.parts)


def _code(config: BenchmarkConfig) -> list[str]:
    """The functions of the user's; those that the harness ships are not."""
    shipped = [located(name) for name in config.task_folders if name.startswith(SHIPPED)]
    tasks = [task for task in _known(config).tasks.values() if not _is_below(task, shipped)]
    return list(dict.fromkeys(str(function) for task in tasks for function in task.functions))


def _is_below(task: TaskFile, folders: list[Path]) -> bool:
    return any(task.file.is_relative_to(folder) for folder in folders)


def _hub_data(config: BenchmarkConfig) -> list[str]:
    sources = (hub_source(task) for task in _known(config).tasks.values())
    return list(dict.fromkeys(source for source in sources if source is not None))


# ---- results ---------------------------------------------------------------------------------------------------------


def _reported(config: BenchmarkConfig) -> Reported:
    """``TASK/METRIC/ARM``; which metrics a task has, the harness decides."""
    tasks = _known(config)
    return Reported(
        counts=("rows", "rows_left_out"),
        families=tuple(f"{name}/" for name in (*tasks.tasks, *tasks.groups)),
        less_is_better=tuple(
            f"{task.name}/{metric}{end}"
            for task in tasks.tasks.values()
            for metric in falling(task)
            for end in ("/", ",")  # the arm or the filter follows
        ),
    )


def _doubts(metrics: Mapping[str, float]) -> list[str]:
    if not metrics.get("rows_left_out"):
        return []
    rows, left_out = metrics["rows"], metrics["rows_left_out"]
    return [
        f"limit left out {left_out:.0f} of {rows + left_out:.0f} rows, so its figures cannot be compared with "
        f"others; set limit to null"
    ]


KIND = StageKind(
    name="benchmark",
    summary="tasks of lm-evaluation-harness on any policy",
    config=BenchmarkConfig,
    revision=7,
    produces="benchmark",
    run="alignment.stages.benchmark.run:run",
    rehearse="alignment.stages.benchmark.run:rehearse",
    rehearse_reads_base=False,
    faults=_faults,
    references=References(faults=_reference_faults),
    files=OtherFiles(located=_located, content=content, code=_code, hub_data=_hub_data),
    launch=LaunchShape(runs_on=RunsOn.one_process),
    outcome=Outcome(metrics=_reported, doubts=_doubts, lines=lines, tables=tables),
)
