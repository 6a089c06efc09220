"""The stage kind ``benchmark``, as the rest of the package sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated

from alignment.config.evaluating import FEW_SHOT, PROMPTED
from alignment.config.faults import Fault
from alignment.config.rules import FILLED, NOT_NEGATIVE, POSITIVE
from alignment.config.run import RunConfig
from alignment.config.stage import not_identity
from alignment.core.errors import DataError
from alignment.core.fingerprint import content_sha256, digest, file_sha256
from alignment.records.benchmark import FILE, Benchmark, BenchmarkTask, Measurement, TaskMetric
from alignment.records.evaluation import BETTER, NO_DIFFERENCE, WORSE, Comparison, p_in_short
from alignment.stages import base
from alignment.stages.benchmark.tasks import (
    HARNESS,
    SHIPPED,
    SKIPPED,
    Chosen,
    TaskFolders,
    Unknown,
    chosen,
    data_files,
    falling,
    hub_source,
    located,
    problems,
    read_folder,
    together,
)


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    """Runs ``tasks`` of lm-evaluation-harness on every arm, and compares arms row by row.

    ``arms`` are ``base``, ``stage:NAME``, ``path:FOLDER`` and ``hub:ORG/NAME@REVISION``. ``tasks`` are names of tasks,
    groups or tags in the YAML files of ``task_folders``. ``limit`` measures only the first rows of each task, to try a
    task out; such figures cannot be compared with others. ``num_fewshot`` replaces each task's own number of examples.
    With ``apply_chat_template`` prompts are turns of a conversation, otherwise plain text.

    ``max_length`` is the largest number of tokens that a model reads at once, by default all of its positions; longer
    prompts lose their beginning. ``max_new_tokens`` limits the answers of tasks that set no limit themselves; its
    default is also the harness's. ``micro_batch_tokens`` tokens are scored at once, and ``batch_size`` answers are
    generated at once. ``bootstrap_samples`` is the number of resamples for the intervals of differences, and for
    standard errors without a formula."""

    kind: str = "benchmark"
    arms: Annotated[list[str], FILLED] = field(
        default_factory=lambda: ["base"], metadata={"reference": ("policy",), "identity": False}
    )
    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list, metadata={"identity": False})
    limit: Annotated[int | None, POSITIVE] = None
    num_fewshot: Annotated[int | None, NOT_NEGATIVE] = None
    apply_chat_template: bool = False
    max_length: Annotated[int | None, POSITIVE] = None
    max_new_tokens: Annotated[int, POSITIVE] = 256
    micro_batch_tokens: Annotated[int, POSITIVE] = not_identity(4096)
    batch_size: Annotated[int, POSITIVE] = not_identity(64)
    bootstrap_samples: Annotated[int, POSITIVE] = 2000


BASE = "base"
"""The arm that others are compared with first."""
_TONES = {BETTER: "good", WORSE: "bad"}
_ABSENT = "–"
_MOST_NAMED = 3
"""How many tasks a sentence names."""


def lines(artifact: Path) -> list[str]:
    """A line for each metric of each task with every arm's value, one for each comparison by a task's first metric, and
    the result in a sentence; none without ``benchmark.json``."""
    if not (artifact / FILE).is_file():
        return []
    record = Benchmark.read(artifact)
    return [
        *(_line(record, task, metric) for task in record.tasks for metric in task.metrics),
        *(_in_words(record, comparison) for comparison in record.comparisons),
        _lead(record),
    ]


def _line(record: Benchmark, task: BenchmarkTask, metric: TaskMetric) -> str:
    values = ", ".join(f"{arm.label} {_in_short(arm.values.get(task.key(metric)))}" for arm in record.arms)
    return f"{task.key(metric)}, {_conditions(task)}: {values}"


def _conditions(task: BenchmarkTask) -> str:
    rows = f"{task.num_rows} rows" if task.num_rows == task.all_rows else f"{task.num_rows} of {task.all_rows} rows"
    return rows if task.num_fewshot is None else f"{task.num_fewshot}-shot, {rows}"


def _cell(measured: Measurement | None) -> base.Cell:
    if measured is None:
        return base.Cell(text=_ABSENT)
    return base.Cell(text=f"{measured.value:.3f}", bounds="" if measured.stderr is None else f"± {measured.stderr:.3f}")


def _in_short(measured: Measurement | None) -> str:
    cell = _cell(measured)
    return f"{cell.text} {cell.bounds}".strip()


def _in_words(record: Benchmark, comparison: Comparison) -> str:
    arm, against = record.label(comparison.arm), record.label(comparison.against)
    interval = f"{comparison.difference:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"
    verdict = record.verdict(comparison)
    return f"{arm} against {against} in {comparison.metric}: {interval}{comparison.p_in_words}, {verdict}"


def _lead(record: Benchmark) -> str:
    """Which arms differ, from ``base`` if it is among them, by the tasks' first metrics; without comparisons, the first
    values of each arm, those of groups of tasks before others."""
    of_base = [comparison for comparison in record.comparisons if comparison.against == BASE]
    by_pair: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in of_base or record.comparisons:
        by_pair.setdefault((comparison.arm, comparison.against), []).append(comparison)
    if by_pair:
        return " ".join(_pair_in_words(record, *pair, comparisons) for pair, comparisons in by_pair.items())
    keys = [
        task.key(metric) for task in sorted(record.tasks, key=lambda task: not task.group) for metric in task.metrics
    ]
    values = {
        arm.label: [f"{key} {_in_short(arm.values[key])}" for key in keys if key in arm.values] for arm in record.arms
    }
    return " ".join(f"{label}: {_listed(named)}." for label, named in values.items() if named)


def _pair_in_words(record: Benchmark, arm: str, against: str, comparisons: Sequence[Comparison]) -> str:
    """``sft is better than base in capitals/acc (+0.200); no real difference in 2 other tasks.``"""
    real = [
        f"{verdict} than {record.label(against)} in {_listed(named)}"
        for verdict in (BETTER, WORSE)
        if (named := [f"{c.metric} ({c.difference:+.3f})" for c in comparisons if record.verdict(c) == verdict])
    ]
    unclear = [comparison.metric for comparison in comparisons if not comparison.real]
    if not real:
        return f"{record.label(arm)} and {record.label(against)}: {NO_DIFFERENCE} in {_listed(unclear)}."
    rest = f"; {NO_DIFFERENCE} in {_listed(unclear)}" if unclear else ""
    return f"{record.label(arm)} is {' and '.join(real)}{rest}."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def tables(artifact: Path) -> list[base.ResultTable]:
    record = Benchmark.read(artifact)
    return [_values(record), *([_differences(record)] if record.comparisons or record.other_comparisons else [])]


def _values(record: Benchmark) -> base.ResultTable:
    template = "with the chat template" if record.chat_template else "without a chat template"
    cut = " A limit left out rows, so these values cannot be compared with others." if record.cut else ""
    rows = [
        (
            task.key(metric),
            [
                base.Cell(text=_ABSENT if task.num_fewshot is None else str(task.num_fewshot)),
                base.Cell(
                    text=str(task.num_rows) if task.num_rows == task.all_rows else f"{task.num_rows}/{task.all_rows}"
                ),
                *(_cell(arm.values.get(task.key(metric))) for arm in record.arms),
            ],
        )
        for task in record.tasks
        for metric in task.metrics
    ]
    arms = {arm.name: arm.label for arm in record.arms}
    return base.ResultTable(
        title="Tasks",
        note=f"Values of lm-evaluation-harness {record.harness} {template}; ± is the standard error.{cut}",
        columns={"examples": "examples", "rows": "rows", **arms},
        rows=rows,
        of_arms=list(arms),
        lead=_lead(record),
    )


def _differences(record: Benchmark) -> base.ResultTable:
    rows = [
        (
            f"{comparison.metric}: {record.label(comparison.arm)} − {record.label(comparison.against)}",
            [
                base.Cell(
                    text=f"{comparison.difference:+.3f}", bounds=f"{comparison.low:+.3f} to {comparison.high:+.3f}"
                ),
                base.Cell(text=_ABSENT if comparison.adjusted_p is None else p_in_short(comparison.adjusted_p)),
                base.Cell(text=verdict, tone=_TONES.get(verdict, "open")),
            ],
        )
        for comparison in (*record.comparisons, *record.other_comparisons)
        for verdict in (record.verdict(comparison),)
    ]
    note = (
        "Differences are paired by row, with 95 % intervals (bootstrap over rows). A difference is real if the p value "
        "of a randomisation test, corrected for the number of comparisons, is below 0.05. Comparisons by the first "
        "metric of each task form one family, all others another."
    )
    columns = {"difference": "difference", "p": "p, corrected", "verdict": "verdict"}
    return base.ResultTable(title="Differences between arms", note=note, columns=columns, rows=rows)


INSTALL = "pip install 'lm_eval>=0.4.13,<0.4.14'"
_RELEASE = "0.4.13"


def _installed() -> str | None:
    try:
        return metadata.version(HARNESS)
    except metadata.PackageNotFoundError:
        return None


def _folders(names: Sequence[str]) -> TaskFolders:
    return together([read_folder(located(name)) for name in names])


def selected(config: BenchmarkConfig) -> Chosen:
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
    yield from _arm_faults(config, where)
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
            message = f"{folder} also contains this run's output, so its content changes; use a separate folder"
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


def _arm_faults(config: BenchmarkConfig, where: str) -> Iterator[Fault]:
    for number, arm in enumerate(config.arms):
        if arm in (PROMPTED, FEW_SHOT):
            message = f"{arm!r} changes prompts, which here belong to tasks; use 'base', and num_fewshot for examples"
            yield Fault(where=f"{where}.arms[{number}]", message=message)


# ---- files -----------------------------------------------------------------------------------------------------------


def _located(config: BenchmarkConfig) -> BenchmarkConfig:
    folders = [name if name.startswith(SHIPPED) else str(located(name)) for name in config.task_folders]
    return replace(config, task_folders=folders)


def content(config: BenchmarkConfig, where: str) -> Mapping[str, str]:
    """The harness's version, and the SHA-256 of each folder of tasks. What tasks read elsewhere is covered too: data,
    included files, and the files of functions.

    Raises:
        DataError: a data file is missing."""
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

    def covers(folder: Path, file: Path) -> bool:
        return file.is_relative_to(folder) and not _is_by_product(file.relative_to(folder))

    return [file for file in files if not any(covers(folder.resolve(), file.resolve()) for folder in folders)]


def _tree_sha256(folder: Path) -> str:
    """The content of all files below a folder, with their names; what Python or an editor leaves there is left out."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return digest({name.as_posix(): file_sha256(file) for name, file in files.items() if not _is_by_product(name)})


def _is_by_product(name: Path) -> bool:
    return any(part.startswith(".") or part in SKIPPED for part in name.parts)


def _code(config: BenchmarkConfig) -> list[str]:
    """The functions of the user's; those that the harness ships are not."""
    shipped = [located(name) for name in config.task_folders if name.startswith(SHIPPED)]
    tasks = [task for task in _known(config).tasks.values() if not any(map(task.file.is_relative_to, shipped))]
    return list(dict.fromkeys(str(function) for task in tasks for function in task.functions))


def _hub_data(config: BenchmarkConfig) -> list[str]:
    sources = (hub_source(task) for task in _known(config).tasks.values())
    return list(dict.fromkeys(source for source in sources if source is not None))


# ---- results ---------------------------------------------------------------------------------------------------------


def _reported(config: BenchmarkConfig) -> base.Reported:
    """``TASK/METRIC/ARM``; which metrics a task has, the harness decides."""
    tasks = _known(config)
    return base.Reported(
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


KIND = base.StageKind(
    name="benchmark",
    summary="tasks of lm-evaluation-harness on any policy",
    config=BenchmarkConfig,
    revision=7,
    produces="benchmark",
    run="alignment.stages.benchmark.run:run",
    rehearse="alignment.stages.benchmark.run:rehearse",
    rehearse_reads_base=False,
    faults=_faults,
    metrics=_reported,
    files=base.OtherFiles(located=_located, content=content, code=_code, hub_data=_hub_data),
    launch=base.LaunchShape(runs_on=base.RunsOn.one_process),
    display=base.Display(doubts=_doubts, lines=lines, tables=tables),
)
