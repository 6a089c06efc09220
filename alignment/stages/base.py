"""What the rest of the package asks a kind of stage. A kind answers in its ``kind.py``; nothing else names a kind.

Every field has a default that fits most kinds. Callables take the settings of a stage of the kind, an instance of its
``config`` class. Nothing here needs torch: the driver asks too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from alignment.config.data import DataConfig, MixedConfig
from alignment.config.faults import Fault
from alignment.config.launch import LaunchConfig
from alignment.config.run import RunConfig
from alignment.config.scoring import ScoreSourceConfig
from alignment.data.records import Record
from alignment.data.tokens.limits import Limits
from alignment.data.tokens.row_kinds import Kind as RowKind


class RunsOn(str, Enum):
    """Where a stage runs: on as many processes as the launch says, on one of them, or inside the driver."""

    processes = "processes"
    one_process = "one process"
    driver = "driver"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSlot:
    """Data that a stage reads, named by its ``field``, such as ``data`` or ``ptx.data``.

    ``record`` is what its rows must be, and ``checks`` raise DataError for a row that lacks something else. ``rows``
    says how a record becomes rows of tokens, for data that a stage learns from. A slot that is not ``in_use`` is
    checked but not read.
    """

    field: str
    data: DataConfig | MixedConfig
    record: type[Record]
    rows: RowKind | None = None
    in_use: bool = True
    checks: tuple[Callable[[Any], object], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place in a stage's configuration that holds a reference.

    Example: ``Slot(field="reward", takes=("reward",), ref="stage:reward")``; ``field`` is ``arms[2]`` inside a list.
    ``external``: a reward model that no stage made fits too, from a folder or a hub. ``optional``: it may be null.
    """

    field: str
    takes: tuple[str, ...]
    ref: str
    external: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Why a stage does not work under a launch: the ``field`` that is in the way, and the nearest that works."""

    field: str
    why: str
    instead: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A chart of metrics.jsonl: ``Curve(title="Margin", unit="", keys=("rewards/margins",), guide=0.0)``.

    ``keys`` are drawn with their ``labels`` over the steps, or over the square root of the metric ``over``. ``guide``
    is a dotted line. With ``only_if_it_moves`` a metric that never changes is left out.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ("",)
    guide: float | None = None
    over: str = ""
    only_if_it_moves: bool = False


LOSS = Curve(title="Loss", unit="", keys=("loss",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """Names of the metrics in a stage's manifest. ``training`` ones come from the rows that the stage learns from;
    ``families`` are beginnings of names that go on in several ways."""

    held_out: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that are known by their whole name."""
        return (*self.held_out, *self.training, *self.counts)

    def __contains__(self, metric: str) -> bool:
        return metric in self.names or metric.startswith(self.families)


def _nothing(*_: Any) -> tuple[()]:
    return ()


def _no_scorers(_: Any) -> Mapping[str, ScoreSourceConfig]:
    return {}


def _unchanged(config: Any, *_: Any) -> Any:
    return config


def _no_metrics(_: Any) -> Reported:
    return Reported()


def _no_words(*_: Any) -> str:
    return ""


def whole_rows(config: Any) -> Limits:
    """Limits of a stage that only says how long a whole row may be."""
    return Limits(row=config.max_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """What the plan asks of a stage's references beyond the fields that are declared as such.

    ``more(config)``: slots elsewhere in the settings. ``faults(config, where)``. ``whole_run``: the stage waits for all
    others, and its identity covers theirs.
    """

    more: Callable[[Any], Iterable[Slot]] = _nothing
    faults: Callable[[Any, str], Iterable[Fault]] = _nothing
    whole_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchShape:
    """How a stage runs, and what it refuses.

    ``refusals(config, launch)``; ``size_faults(config, processes, where)``: what does not divide by the processes;
    ``check_machine(config, where)`` raises ConfigError where this machine lacks something that the stage needs.
    """

    runs_on: RunsOn = RunsOn.processes
    refusals: Callable[[Any, LaunchConfig], Iterable[Refusal]] = _nothing
    size_faults: Callable[[Any, int, str], Iterable[Fault]] = _nothing
    check_machine: Callable[[Any, str], object] = _nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Learning:
    """How a stage that trains makes use of its data.

    ``limits(config)``: how long rows may be. ``faults(config, num_prompts, where)``: what so many different prompts are
    too few for. ``one_row_a_record(config)``: whether the number of rows is known before they are tokenised.
    ``batches_of_rows``: whether ``optim.batch_size`` counts rows. ``rehearsed``: whether the first rows are tokenised
    before anything trains. ``may_drop``: whether dropout in an adapter is allowed. ``from_preferences``: whether it
    learns what is preferred, so that the verdict compares it with what learned from demonstrations.
    """

    limits: Callable[[Any], Limits] = whole_rows
    faults: Callable[[Any, int, str], Iterable[Fault]] = _nothing
    one_row_a_record: Callable[[Any], bool] = lambda _: True
    batches_of_rows: bool = True
    rehearsed: bool = True
    may_drop: bool = False
    from_preferences: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a stage's result says.

    ``metrics(config)``: the names in its manifest; ``why_missing(config, metric, stage)``: why it does not report one
    that other settings would give, or "". ``doubts(metrics)``: sentences against building on the result.
    ``lines(artifact)``: what is printed of the result after a run and by ``align status``.
    ``against_forgetting(name)``: what helps where its policy forgot too much.
    """

    metrics: Callable[[Any], Reported] = _no_metrics
    why_missing: Callable[[Any, str, str], str] = _no_words
    doubts: Callable[[Mapping[str, float]], Sequence[str]] = _nothing
    lines: Callable[[Any], Sequence[str]] = _nothing
    against_forgetting: Callable[[str], str] = _no_words


@dataclass(frozen=True, kw_only=True, slots=True)
class StageKind:
    """One kind of stage.

    ``config`` is the dataclass of its settings; ``revision`` is raised when the meaning of a result changes;
    ``produces`` is the kind of its artifact. ``run`` is the worker's function, ``package.module:function``, called as
    ``run(config, context)`` on every process; a stage inside the driver has none.

    ``data(config)``: what it reads. ``scorers(config)``: scorers by the field that holds each. ``faults(config, run,
    where)``: settings that cannot be right. ``completed(config, run)``: the settings with what other stages say.
    ``as_read(config)``: the settings without those that nothing reads. ``curves(settings)``: its charts, by its plain
    settings. ``smoke``: what ``profile=smoke`` lays over its settings, where the profile's file does not.
    """

    name: str
    summary: str
    config: type[Any]
    revision: int
    produces: str
    run: str = ""
    data: Callable[[Any], Sequence[DataSlot]] = _nothing
    scorers: Callable[[Any], Mapping[str, ScoreSourceConfig]] = _no_scorers
    faults: Callable[[Any, RunConfig, str], Iterable[Fault]] = _nothing
    completed: Callable[[Any, RunConfig], Any] = _unchanged
    as_read: Callable[[Any], Any] = _unchanged
    curves: Callable[[Mapping[str, Any]], Sequence[Curve]] = _nothing
    references: References = References()
    launch: LaunchShape = LaunchShape()
    learning: Learning = Learning()
    outcome: Outcome = Outcome()
    smoke: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it trains a model, on one process or several; then it has the fields of ``TrainedConfig``."""
        return self.launch.runs_on is RunsOn.processes
