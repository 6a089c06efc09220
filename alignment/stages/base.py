"""The interface of a stage kind. Each kind defines a ``StageKind`` in its ``kind.py``; no other module names a kind.
Optional fields have defaults that fit most kinds. Unless stated otherwise, callables take the settings of a stage of
the kind, an instance of its ``config`` class. Nothing here imports torch, because the driver uses it too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from alignment.config.data import DataConfig, MixedConfig
from alignment.config.faults import Fault
from alignment.config.launch import LaunchConfig
from alignment.config.new_recipe import Circumstances, NewStage, Question
from alignment.config.run import RunConfig
from alignment.config.scoring import MetricConfig, ScoreSourceConfig
from alignment.data.records import Record
from alignment.data.tokens.row_kinds import Kind as RowKind
from alignment.data.tokens.row_kinds import Limits


class LearnsFrom(str, Enum):
    """What teaches a policy: demonstrations, preferences, or scores of its own answers."""

    demonstrations = "demonstrations"
    preferences = "preferences"
    scores = "scores"


class RunsOn(str, Enum):
    """Where a stage runs. ``processes``: on all processes of the launch, which train one model. ``replicas``: on all of
    them, each of which holds whole models, so the launch's sharding does not apply. ``one_process``; ``driver``: inside
    the driver."""

    processes = "processes"
    replicas = "replicas"
    one_process = "one process"
    driver = "driver"

    @property
    def on_all(self) -> bool:
        """Whether it runs on all processes of the launch, on every machine."""
        return self in (RunsOn.processes, RunsOn.replicas)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSlot:
    """Data that a stage reads, named by its ``field``, such as ``data`` or ``ptx.data``. ``record`` is the type of its
    rows, and ``checks`` raise DataError for a row that lacks something else. ``skippable_checks`` do so too, but the
    stage leaves such rows out if ``on_error`` is ``skip``. For data that a stage learns from, ``rows`` defines how a
    record becomes rows of tokens. A slot that is not ``in_use`` is checked but not read. ``label`` names the label of a
    record; a plan counts the records of each. ``counted``: each record becomes one row of ``optim.batch_size``, so that
    the number of rows is known before tokenising; rows of a stage with ``packing`` are fewer."""

    field: str
    data: DataConfig | MixedConfig
    record: type[Record]
    rows: RowKind | None = None
    in_use: bool = True
    checks: tuple[Callable[[Any], object], ...] = ()
    skippable_checks: tuple[Callable[[Any], object], ...] = ()
    label: Callable[[Any], str] | None = None
    counted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeRows:
    """The form of the rows that a stage makes for other stages, known before there are any. ``example`` is such a row
    as JSON. ``others`` are the rows that it would make with other settings, by the setting: ``{"select=best":
    '{"messages": …}'}``."""

    example: str
    others: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A field of a stage's configuration that holds a reference. Example: ``Slot(field="reward", takes=("reward",),
    ref="stage:reward")``; inside a list, ``field`` is ``arms[2]``. ``external``: a reward model from a folder or a hub
    is allowed too. ``optional``: the reference may be null."""

    field: str
    takes: tuple[str, ...]
    ref: str
    external: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a stage does not work under a launch: the ``field`` that prevents it, and what to set ``instead``."""

    field: str
    why: str
    instead: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A chart of metrics.jsonl: ``Curve(title="Margin", unit="", keys=("rewards/margins",), guide=0.0)``. ``keys`` are
    drawn with their ``labels`` over the steps, or over the square root of the metric ``over``. ``guide`` is a dotted
    line. With ``only_if_it_moves`` a metric that never changes is left out. While a stage runs, the first metric of its
    ``live`` chart is shown; without such a chart, that of the first one."""

    title: str
    unit: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    guide: float | None = None
    over: str = ""
    only_if_it_moves: bool = False
    live: bool = False


LOSS = Curve(title="Loss", unit="", keys=("loss",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A cell of a table: ``Cell(text="0.714", bounds="0.66 to 0.76")``. ``tone`` is ``good``, ``bad``, ``open`` or "",
    and colours a verdict."""

    text: str
    bounds: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultTable:
    """A table of a result, for the run's page, the page that compares runs, and model cards. ``columns`` are headings
    by key. A column about an arm has the arm's name as its key (``stage:dpo``), so that a model card can pick the
    columns about one policy; ``of_arms`` are these keys. A row is a label and a cell for each column. ``lead`` is the
    result in a sentence or two, with which the page of a run without an evaluation begins."""

    title: str
    note: str
    columns: Mapping[str, str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    of_arms: Sequence[str] = ()
    lead: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """Names of the metrics in a stage's manifest. ``training`` metrics are measured on the rows that the stage learns
    from; ``families`` are prefixes of names. Of metrics whose names begin with one of ``less_is_better``, less is
    better; those whose names begin with one of ``half_by_chance`` are 0.5 by chance, because they are shares of pairs.
    ``absent``: by the beginning of its name, what a metric needs that the settings turn off, and the remedy:
    ``{"guard/": ("a guard", "guard.every above 0")}``."""

    held_out: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    less_is_better: tuple[str, ...] = ()
    half_by_chance: tuple[str, ...] = ()
    absent: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that are known in full."""
        return (*self.held_out, *self.training, *self.counts)

    def __contains__(self, metric: str) -> bool:
        return metric in self.names or metric.startswith(self.families)


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _unchanged(config: Any, *_: Any) -> Any:
    return config


def whole_rows(config: Any) -> Limits:
    """Limits of a stage that only sets the maximum length of a whole row."""
    return Limits(row=config.max_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherFiles:
    """Files that a stage reads besides its data and models, such as votes, or descriptions of tasks. ``paths(config,
    folder)``: files for the worker (``StageSpec.extra_data``), by field, which exist and are valid, else DataError;
    ``folder`` is the run's folder of the stage. A fingerprint covers their content. ``located(config)``: the settings
    with absolute paths, because a worker may run in another folder. ``content(config, where)``: what a fingerprint
    covers of the files, such as the SHA-256 of each, by a name that does not depend on where they are; raises DataError
    if a file is missing. ``code(config)``: the user's code in them that the stage runs, for announcements.
    ``hub_data(config)``: the data sets of a hub that they name, ``hub:ORG/NAME@REVISION``; the worker finds each under
    its name in ``StageSpec.extra_data``."""

    paths: Callable[[Any, Path], Mapping[str, Path]] = lambda *_: {}
    located: Callable[[Any], Any] = _unchanged
    content: Callable[[Any, str], Mapping[str, str]] = lambda *_: {}
    code: Callable[[Any], Sequence[str]] = _nothing
    hub_data: Callable[[Any], Sequence[str]] = _nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchShape:
    """How a stage runs, and which launches it refuses. ``refusals(config, launch)``: why it does not work under the
    launch. ``size_faults(config, processes, where)``: sizes that do not divide by the number of processes.
    ``check_machine(config, where)`` raises ConfigError if this machine lacks something that the stage needs."""

    runs_on: RunsOn = RunsOn.processes
    refusals: Callable[[Any, LaunchConfig], Iterable[Refusal]] = _nothing
    size_faults: Callable[[Any, int, str], Iterable[Fault]] = _nothing
    check_machine: Callable[[Any, str], object] = _nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How a stage that trains uses its data. ``limits(config)``: how long rows may be. ``faults(config, prompts,
    labels, where)``: settings that need more than ``prompts`` different prompts, or other numbers of records of each
    label. ``layers(config, layers, where)``: of the ``layers`` of its ``init``, how many are in its result; raises
    ConfigError if the settings do not fit them. ``may_drop``: whether dropout in an adapter is allowed.
    ``learns_from``: what teaches its policy; the verdict compares a policy that learned from preferences or scores with
    the one from demonstrations that it started from."""

    limits: Callable[[Any], Limits] = whole_rows
    faults: Callable[[Any, int, Mapping[str, int], str], Iterable[Fault]] = _nothing
    layers: Callable[[Any, int, str], int] = lambda _, layers, __: layers
    may_drop: bool = False
    learns_from: LearnsFrom | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Display:
    """What only pages and lines about a result need. ``curves(settings)``: the charts, given the stage's settings as
    plain values. ``doubts(metrics)``: warnings against using the result. ``lines(artifact)``: what is printed of the
    result after a run and by ``align status``. ``tables(artifact)``: the tables that pages and model cards show of it;
    raises ArtifactError or FileNotFoundError if there is nothing to read. If ``doubts``, ``lines`` or ``tables`` of
    another package fails, the error and its line are shown in its place. ``against_forgetting(name)``: advice for stage
    ``name`` if its policy forgot too much. ``primary(config)``: the metric by which it compares arms, if it does."""

    curves: Callable[[Mapping[str, Any]], Sequence[Curve]] = _nothing
    doubts: Callable[[Mapping[str, float]], Sequence[str]] = _nothing
    lines: Callable[[Path], Sequence[str]] = _nothing
    tables: Callable[[Path], Sequence[ResultTable]] = _nothing
    against_forgetting: Callable[[str], str] = lambda *_: ""
    primary: Callable[[Any], MetricConfig | None] = lambda _: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposals:
    """What the kind contributes to a recipe that `align new` writes. ``questions(circumstances)``: what only the user
    can decide. ``stage(circumstances)``: the stage with its settings, or None if it does not fit the data and the
    answers. Kinds are asked in the order of the registry, and each is told of the stages before it."""

    questions: Callable[[Circumstances], Iterable[Question]] = _nothing
    stage: Callable[[Circumstances], NewStage | None] = lambda _: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a plan knows of a stage: its ``folder`` in the run, whether it has to run, the numbers of its records by
    label (empty if unknown), and the size of the base model's files in bytes (None if they are not here)."""

    folder: Path
    has_to_run: bool = True
    labels: Mapping[str, int] = field(default_factory=dict)
    weights: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StageKind:
    """One kind of stage.

    ``config`` is the dataclass of its settings; ``revision`` is raised when the meaning of a result changes;
    ``produces`` is the kind of its artifact. ``run`` is the worker's function, ``package.module:function``, called as
    ``run(config, context)`` on every process; a stage inside the driver has none, waits for all others, and its
    identity covers theirs. ``rehearse`` names a function in the same way: ``rehearse(config, context)`` raises an
    AlignmentError if the stage cannot work, for example because the run's base model does not fit it. It is called
    before the first stage of a run, on one process, and must write nothing. ``rehearse_reads_base``: whether that
    function reads the base model, so that it is not called where a policy of the stage began as another one.

    ``data(config)``: the data that it reads. ``rows(config)``: the rows that it makes, if it produces ``ROWS``.
    ``scorers(config)``: its scorers, by field. ``slots(config)``: references in its settings besides the fields that
    are declared as references. ``faults(config, run, where)``: settings that cannot be right. ``completed(config,
    run)``: the settings, with values that follow from other stages filled in. ``as_read(config)``: the settings, with
    unused ones at their defaults. ``metrics(config)``: the names in its manifest. ``notes(config, planned)``: what a
    plan says of it, such as what it costs, as sentences. ``smoke``: values that ``profile=smoke`` sets, unless the
    profile's file sets others.

    Some settings mean the same in every kind: ``gate`` lists what a run requires of an evaluation, and ``leave_out``
    data whose prompts are left out; the plan fills an empty list with the data of the run's evaluations."""

    name: str
    summary: str
    config: type[Any]
    revision: int
    produces: str
    run: str = ""
    rehearse: str = ""
    rehearse_reads_base: bool = True
    data: Callable[[Any], Sequence[DataSlot]] = _nothing
    rows: Callable[[Any], MadeRows | None] = lambda _: None
    scorers: Callable[[Any], Mapping[str, ScoreSourceConfig]] = lambda _: {}
    slots: Callable[[Any], Iterable[Slot]] = _nothing
    faults: Callable[[Any, RunConfig, str], Iterable[Fault]] = _nothing
    completed: Callable[[Any, RunConfig], Any] = _unchanged
    as_read: Callable[[Any], Any] = _unchanged
    metrics: Callable[[Any], Reported] = lambda _: Reported()
    notes: Callable[[Any, Planned], Iterable[str]] = _nothing
    smoke: Mapping[str, Any] = field(default_factory=dict)
    files: OtherFiles = OtherFiles()
    launch: LaunchShape = LaunchShape()
    learning: Learning = Learning()
    display: Display = Display()
    proposals: Proposals = Proposals()

    @property
    def trains(self) -> bool:
        """Whether it trains a model; then its settings have the fields of ``TrainedConfig``."""
        return self.launch.runs_on is RunsOn.processes

    @property
    def in_driver(self) -> bool:
        """Whether it runs inside the driver, after all other stages."""
        return self.launch.runs_on is RunsOn.driver
