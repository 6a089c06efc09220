"""Runs the harness for one arm, and reads what it returns."""

from __future__ import annotations

import math
import random
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from alignment.core.errors import AlignmentError, DataError, NonFiniteError, StageError
from alignment.records.benchmark import BenchmarkRow, BenchmarkTask, Measurement, RowAnswer, TaskMetric
from alignment.stages.benchmark.kind import BenchmarkConfig, selected
from alignment.stages.benchmark.tasks import Chosen, TaskFile, hub_source
from alignment.training.context import StageContext

_PACKAGES = {"antlr4": "antlr4-python3-runtime==4.11", "sklearn": "scikit-learn", "MeCab": "mecab-python3"}
"""Packages whose modules have another name."""
_OF_HUB = re.compile(r"on the (Hugging Face )?Hub|OfflineMode")
Loaded = Any
"""What ``TaskManager.load`` returns: tasks and groups by name."""


def load(chosen: Chosen, names: list[str], folder: Path, hub_data: Mapping[str, Path], *, where: str) -> Loaded:
    """The tasks, with their data read; ``folder`` is for files of this stage, ``hub_data`` has snapshots by source."""
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


UNFILTERED = "none"
"""The harness's name of the filter that changes nothing."""
_SEEDS = (0, 1234, 1234)
"""Those that the harness's command starts ``random``, NumPy and PyTorch with; tasks may draw."""
_CLOSE = 1e-9
_PACKAGE = Path(__file__).parents[2]


def seed_generators() -> None:
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[2])


def random_state() -> tuple[Any, Any, torch.Tensor]:
    """Their state once the tasks are loaded, to which ``restore`` returns, so that every arm gets the same prompts."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def restore(state: tuple[Any, Any, torch.Tensor]) -> None:
    """Goes back to a ``random_state``."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmRun:
    """One arm: its tasks with their metrics, the values by ``TASK/METRIC``, and the rows of each task by number."""

    tasks: list[BenchmarkTask]
    values: dict[str, Measurement]
    rows: dict[str, dict[int, BenchmarkRow]]


def run_arm(model: LM, loaded: Loaded, chosen: Chosen, config: BenchmarkConfig, *, name: str, where: str) -> ArmRun:
    """Has the harness ask ``model`` all tasks; ``name`` names the arm in errors."""
    for task in loaded["tasks"].values():
        if config.num_fewshot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the next arm gets the same examples
    try:
        results = evaluate(
            lm=model,
            task_dict=loaded,
            limit=config.limit,
            bootstrap_iters=config.bootstrap_samples,
            log_samples=True,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=False,
        )
    except Exception as error:
        if _is_ours(error):
            raise
        raise StageError(
            f"the harness failed: {described(error, chosen)}",
            where=where,
            remedy=remedy_for(error, otherwise="correct the task's file, its functions or its rows, and run again"),
        ) from error
    for task_name, task in loaded["tasks"].items():
        _refuse_wrong_targets(results["samples"][task_name], task, where=f"{where}: {task_name}")
    tasks = [*_tasks(results, loaded), *_groups(results)]
    values = {
        task.key(metric): _measurement(results, task.name, metric, name) for task in tasks for metric in task.metrics
    }
    rows = {task: _rows(task, name, samples) for task, samples in results["samples"].items()}
    return ArmRun(tasks=tasks, values=values, rows=rows)


def _is_ours(error: Exception) -> bool:
    """Whether code of this package below the harness raised the error, or memory ran out: the worker reports those."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    last = next(file for file in reversed(files) if Path(file).is_relative_to(_PACKAGE))
    own = type(error).__module__.startswith("alignment.")
    of_system = isinstance(error, OSError) and error.errno is not None  # not a hub's error
    return own or of_system or isinstance(error, (MemoryError, torch.OutOfMemoryError)) or last != __file__


def _refuse_wrong_targets(samples: Sequence[Mapping[str, Any]], task: Any, *, where: str) -> None:
    """The harness counts such a row as wrong, and mentions it only in its log."""
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        targets = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
        for target in targets:
            if target not in range(len(choices)) if isinstance(target, int) else target not in choices:
                raise DataError(
                    f"the right answer of row {sample['doc_id']} is {target!r}, which is not one of its choices: "
                    f"{', '.join(map(repr, choices))}",
                    where=where,
                    remedy="correct the row, or doc_to_target in the task's file",
                )


# ---- what the harness returns ----------------------------------------------------------------------------------------


def _tasks(results: Mapping[str, Any], loaded: Loaded) -> list[BenchmarkTask]:
    return [
        BenchmarkTask(
            name=name,
            version=str(results["versions"].get(name, "")),
            num_fewshot=int(results["n-shot"].get(name, 0)),
            num_rows=int(results["n-samples"][name]["effective"]),
            all_rows=int(results["n-samples"][name]["original"]),
            metrics=_in_order(list(_metrics(results, name)), task),
        )
        for name, task in loaded["tasks"].items()
    ]


def _groups(results: Mapping[str, Any]) -> list[BenchmarkTask]:
    """Groups for which the harness gives a value of all their tasks together."""
    counts = results["n-samples"]
    groups = []
    for name in results.get("groups") or {}:
        below = [counts[task] for task in _below(name, results["group_subtasks"]) if task in counts]
        groups.append(
            BenchmarkTask(
                name=name,
                group=True,
                version=str(results["versions"].get(name) or ""),
                num_fewshot=results["n-shot"].get(name),
                num_rows=sum(int(count["effective"]) for count in below),
                all_rows=sum(int(count["original"]) for count in below),
                metrics=list(_metrics(results, name)),
            )
        )
    return groups


def _below(name: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for child in children.get(name, ()):
        yield child
        yield from _below(child, children)


def _in_order(metrics: list[TaskMetric], task: Any) -> list[TaskMetric]:
    """As the task's file lists them; the first one is what arms are compared by."""
    listed = [str(metric.get("metric")) for metric in task.get_config("metric_list") or []]
    return sorted(metrics, key=lambda metric: listed.index(metric.name) if metric.name in listed else len(listed))


def _metrics(results: Mapping[str, Any], name: str) -> Iterator[TaskMetric]:
    """The metrics of a task or group, from the keys ``METRIC,FILTER`` of its results."""
    directions = results["higher_is_better"].get(name, {})
    for key, value in results["results"].get(name, results.get("groups", {}).get(name, {})).items():
        metric, comma, of_filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            scores = _scores(results["samples"].get(name, []), metric, of_filter)
            yield TaskMetric(
                name=metric,
                filter=_filter(of_filter),
                higher_is_better=directions.get(metric) is not False,
                by_row=bool(scores) and math.isclose(sum(scores) / len(scores), value, rel_tol=_CLOSE, abs_tol=_CLOSE),
            )


def _filter(name: str) -> str:
    return "" if name == UNFILTERED else name


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, of_filter: str) -> list[float]:
    """Each row's score; empty if the metric has no number for each row."""
    scores: list[Any] = [sample.get(metric) for sample in samples if sample["filter"] == of_filter]
    return [float(score) for score in scores] if all(map(_is_score, scores)) else []


def _is_score(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _measurement(results: Mapping[str, Any], task: str, metric: TaskMetric, arm: str) -> Measurement:
    of_task = results["results"].get(task) or results["groups"][task]
    of_filter = metric.filter or UNFILTERED
    value = float(of_task[f"{metric.name},{of_filter}"])
    if not math.isfinite(value):
        raise NonFiniteError(
            f"{metric.title} of {arm} in {task} is {value}",
            remedy="its training went wrong: lower its learning rate, or leave out the arm",
        )
    stderr = of_task.get(f"{metric.name}_stderr,{of_filter}")
    has_stderr = _is_number(stderr) and math.isfinite(stderr)
    return Measurement(value=value, stderr=float(stderr) if has_stderr else None)


def _rows(task: str, arm: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, BenchmarkRow]:
    """The rows of a task by number, with the arm's answers; the harness lists a row once for each filter."""
    by_number: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_number.setdefault(int(sample["doc_id"]), []).append(sample)
    return {
        number: BenchmarkRow(
            task=task,
            number=number,
            id=of_row[0]["doc_hash"],
            prompt=str(of_row[0]["arguments"][0][0]),
            target=str(of_row[0]["target"]),
            answers={arm: _answer(of_row)},
        )
        for number, of_row in by_number.items()
    }


def _answer(of_row: Sequence[Mapping[str, Any]]) -> RowAnswer:
    """The scores of a row, with the log-probabilities, or the text, of the answers to its requests."""
    scores = {
        TaskMetric(name=metric, filter=_filter(sample["filter"])).title: float(sample[metric])
        for sample in of_row
        for metric in sample["metrics"]
        if _is_score(sample[metric])
    }
    answers = [resps[0] for resps in of_row[0]["resps"]]
    if all(isinstance(answer, str) for answer in answers):
        return RowAnswer(scores=scores, text=answers[0])
    logprobs = [float(answer[0] if isinstance(answer, (tuple, list)) else answer) for answer in answers]
    return RowAnswer(scores=scores, logprobs=logprobs)


NUM_ROWS = 100
"""How many rows of each task are tried: a function may need a package or a file for some rows only (chosen, not
tuned)."""


class _SameAnswer(LM):
    """Answers every request alike, without a model."""

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        return ["Yes." for _ in requests]


def try_tasks(config: BenchmarkConfig, context: StageContext) -> None:
    """Loads the tasks with their data and functions, and has their metrics score the first rows."""
    where = f"stages.{context.spec.stage}.tasks"
    chosen = selected(config)
    limit = min(config.limit or NUM_ROWS, NUM_ROWS)
    brief = replace(config, limit=limit, apply_chat_template=False, bootstrap_samples=1)
    with TemporaryDirectory() as folder:
        loaded = load(chosen, config.tasks, Path(folder), context.spec.extra_data, where=where)
        try:
            run_arm(_SameAnswer(), loaded, chosen, brief, name="the trial", where=where)
        except NonFiniteError:
            pass  # of answers that no model gave
        except StageError as error:
            if not isinstance(error.__cause__, ArithmeticError):
                raise
            context.notes.append(f"with made-up answers {error.message}; with a model's answers it may not happen")
