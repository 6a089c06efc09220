"""The harness's own task objects, loaded from the recipe's files with data that is on this machine."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from alignment.core.errors import AlignmentError, DataError
from alignment.stages.benchmark.task_choice import Chosen, hub_source
from alignment.stages.benchmark.task_files import TaskFile

_PACKAGES = {"antlr4": "antlr4-python3-runtime==4.11", "sklearn": "scikit-learn", "MeCab": "mecab-python3"}
"""Packages whose modules have another name."""
_OF_HUB = re.compile(r"on the (Hugging Face )?Hub|OfflineMode")
Loaded = Any
"""What ``TaskManager.load`` returns: tasks and groups by name."""


def load(chosen: Chosen, names: list[str], folder: Path, hub_data: Mapping[str, Path], *, where: str) -> Loaded:
    """The tasks, with their data read. ``folder`` is for files of this stage; ``hub_data`` has the snapshots by source.

    Raises:
        DataError: a task's data or its functions cannot be used.
    """
    written = folder / "tasks"
    written.mkdir(parents=True, exist_ok=True)
    files = [*chosen.tasks.values(), *chosen.groups.values()]
    for number, file in enumerate(files):
        content = {"include": str(file.file), **({} if file.is_group else _data(file, folder, hub_data))}
        (written / f"{number}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    manager = TaskManager(include_path=str(written), include_defaults=False)
    try:
        return manager.load(_names(chosen, names))
    except AlignmentError:
        raise
    except Exception as error:
        raise DataError(
            f"the harness cannot load {', '.join(names)}: {described(error, chosen)}",
            where=where,
            remedy=remedy_for(error, otherwise="correct the task's file, its functions or its data"),
        ) from error


def _names(chosen: Chosen, names: list[str]) -> list[str]:
    """The names to load; a tag is replaced by its tasks."""
    known = {*chosen.tasks, *chosen.groups}
    tagged = [task.name for name in names if name not in known for task in chosen.tasks.values() if name in task.tags]
    return list(dict.fromkeys([*(name for name in names if name in known), *tagged]))


def _data(task: TaskFile, folder: Path, hub_data: Mapping[str, Path]) -> dict[str, Any]:
    """The settings by which a task finds its data, wherever the stage runs; ``datasets`` keeps its copy in the stage's
    own folder."""
    if task.settings.get("custom_dataset") is not None:
        return {}
    arguments = dict(task.settings.get("dataset_kwargs") or {})
    arguments["cache_dir"] = str(folder / "datasets")
    source = hub_source(task)
    if source is None:
        return {"dataset_path": task.settings["dataset_path"], "dataset_kwargs": arguments}
    arguments.pop("revision", None)  # the snapshot is of one revision
    return {"dataset_path": str(hub_data[source]), "dataset_kwargs": arguments}


def described(error: Exception, chosen: Chosen) -> str:
    """``KeyError at /home/me/tasks/utils.py:10: 'answer'``, with the line of the user's function if one raised it."""
    folders = {file.file.parent for file in (*chosen.tasks.values(), *chosen.groups.values())}
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(folder) for folder in folders)]
    at = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{at}: {' '.join(str(error).split())}"


def remedy_for(error: BaseException, *, otherwise: str) -> str:
    """What provides the package, the NLTK data or the files of a hub that a task's functions need; ``otherwise`` if
    nothing of that kind is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"pip install {_PACKAGES.get(package, package)}"
    if isinstance(error, LookupError) and (data := re.search(r"nltk\.download\('([\w.-]+)'\)", str(error))):
        return f"python -m nltk.downloader {data[1]}"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) or _OF_HUB.search(str(error)):
        return (
            "stages have no network; load this once where there is one: a model with hf download ORG/NAME, a data set "
            "with datasets.load_dataset, a metric with evaluate.load"
        )
    below = error.__cause__ or error.__context__
    return otherwise if below is None else remedy_for(below, otherwise=otherwise)


def prepare(loaded: Loaded, *, num_fewshot: int | None) -> None:
    """Sets the number of examples, and draws the same ones again for the next arm.

    The harness's command does this for one model; its generators would give the next model other examples.
    """
    for task in loaded["tasks"].values():
        if num_fewshot is not None:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
