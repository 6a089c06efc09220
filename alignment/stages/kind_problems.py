"""What is wrong with a kind of stage from another package, and with its settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import traceback
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from alignment.config.typed import field_types, to_plain
from alignment.core.artifacts import ROWS
from alignment.core.errors import AlignmentError
from alignment.data.records import Record
from alignment.stages.base import Cell, Curve, MadeRows, Reported, ResultTable, StageKind

_INSTEAD: dict[Any, str] = {
    Literal: "an Enum",
    Path: "str",
    dict: "dict[str, TYPE]",
    **dict.fromkeys((list, tuple, set, frozenset), "list[TYPE]"),
}
_ANY_OF_THEM = "bool, int, float, str or an Enum, list[TYPE] or dict[str, TYPE] of these, a dataclass, or a list of one"


def of_settings(settings: type, *, where: str = "", inside: tuple[type, ...] = ()) -> Iterator[str]:
    """What is wrong with the types in a dataclass, and in those ``inside`` it, each as the end of a sentence. Raises
    Exception: whatever another package's annotations raise when they are read."""
    for name, hint in field_types(settings).items():
        for part in _not_for_recipes(hint):
            remedy = _INSTEAD.get(get_origin(part) or part, _ANY_OF_THEM)
            shown = _shown(hint if _is_group(part) else part)
            yield f"has a setting {where}{name} of the type {shown}, which a recipe cannot hold; use {remedy}"
        for group in _groups(hint):
            if group is not hint and (why := _why_not_made(group)):
                every = f"give every setting of {group.__name__} a default"
                yield f"has a setting {where}{name} of groups without defaults: {why}; {every}"
            if group not in inside:
                yield from of_settings(group, where=f"{where}{name}.", inside=(*inside, group))


def _options(hint: Any) -> list[Any]:
    options = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    return [option for option in options if option is not NoneType]


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _groups(hint: Any) -> list[type]:
    items = get_args(hint) if get_origin(hint) is list else _options(hint)
    return [item for item in items if _is_group(item)]


def _not_for_recipes(hint: Any) -> list[Any]:
    groups = _groups(hint)
    if not groups:
        return _not_plain(hint)
    if get_origin(hint) is list or hint is groups[0] or (len(_options(hint)) == 1 and NoneType in get_args(hint)):
        return []
    by_kind = len(groups) == len(get_args(hint)) and all("kind" in field_types(group) for group in groups)
    return [] if by_kind else [hint]


def _not_plain(hint: Any) -> list[Any]:
    options, base, arguments = _options(hint), get_origin(hint), get_args(hint)
    if options != [hint]:
        return [part for option in options for part in _not_plain(option)]
    if (base is list and arguments) or (base is dict and arguments[:1] == (str,)):
        return _not_plain(arguments[-1])
    is_plain = hint in (bool, int, float, str, Any) or (isinstance(hint, type) and issubclass(hint, Enum))
    return [] if base is None and is_plain else [hint]


def _why_not_made(group: type) -> str:
    try:
        group()
    except Exception as error:  # noqa: BLE001 - another package's code
        return _raised(error)
    return ""


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


_TRAINED = ("init", "adapter", "data", "optim")
"""The settings of ``TrainedConfig``."""
_IN_ONE_PROCESS = "set launch=LaunchShape(runs_on=RunsOn.one_process)"
_RECORDS = get_args(Record)


class KindError(AlignmentError):
    """A function with which a kind of stage shows its results failed. The results themselves are complete."""


def of_kind(kind: StageKind) -> str:
    """What is wrong with the kind and what to change, as the end of a sentence about it; "" if it can be used."""
    settings = kind.config
    if not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        return f"has settings that are not a dataclass; put @dataclass(kw_only=True, slots=True) above {settings!r}"
    try:
        config = settings()
    except Exception as error:  # noqa: BLE001 - another package's code; the other kinds still work
        return f"has settings without defaults: {_raised(error)}; give every setting a default"
    try:
        problem = next(of_settings(settings), "")
    except Exception as error:  # noqa: BLE001
        return f"has settings whose types cannot be read: {_raised(error)}; import the types outside TYPE_CHECKING"
    declared = getattr(config, "kind", None)
    if not problem and declared != kind.name:
        instead = "without a kind" if declared is None else f"of the kind {declared!r}"
        problem = f"has settings {instead}; write kind: str = {kind.name!r} in {settings.__name__}"
    return problem or _launch_problem(kind) or _call_problem(kind, config)


def _launch_problem(kind: StageKind) -> str:
    if kind.in_driver:
        return f"runs inside the driver, which only built-in kinds can; {_IN_ONE_PROCESS}"
    has = {field.name for field in dataclasses.fields(kind.config)}
    lacking = [name for name in _TRAINED if name not in has]
    if kind.trains and lacking:
        return (
            f"trains a model, but {kind.config.__name__} lacks {', '.join(lacking)}; "
            f"add these settings or, if it trains no model, {_IN_ONE_PROCESS}"
        )
    for field, named in (("run", kind.run), ("rehearse", kind.rehearse)):
        # Only the module is looked up, not the function: importing it would import the training libraries.
        module, _, function = named.partition(":")
        missing = "no function" if not (module and function) else "" if _exists(module) else f"no module {module}"
        if missing and (named or field == "run"):
            return f"has {field}={named!r}, but there is {missing}; set {field}='PACKAGE.MODULE:FUNCTION'"
    return ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _call_problem(kind: StageKind, config: Any) -> str:
    """Calls what a plan and the live view call, where an error would end the run."""
    name = kind.config.__name__
    called = f"data({name}())"
    try:
        slots = [(slot.field, slot.record, slot.rows) for slot in kind.data(config)]
        called = f"rows({name}())"
        made = kind.rows(config)
        called = f"metrics({name}())"
        reported: Any = kind.metrics(config)
        called = f"Display.curves(settings of {name}())"
        charts = list(kind.display.curves(to_plain(config)))
    except Exception as error:  # noqa: BLE001
        return f"has a function that fails: {called} raises {_raised(error)}; correct it"
    if others := [(field, record) for field, record, _ in slots if record not in _RECORDS]:
        names = ", ".join(known.__name__ for known in _RECORDS)
        field, record = others[0]
        return f"reads {field!r} as {record!r}, which is not a record; use a class of alignment.data.records: {names}"
    if kind.trains and not any(field == "data" and rows is not None for field, _, rows in slots):
        return "trains a model, but data has no DataSlot(field='data', …, rows=…); add one, which says what it learns"
    if kind.produces == ROWS and not isinstance(made, MadeRows):
        return "makes rows, but shows none; add rows=lambda config: MadeRows(example='{…}', others={})"
    if not isinstance(reported, Reported):
        return f"returns no Reported from metrics({name}()); return Reported(…)"
    is_charts = all(isinstance(chart, Curve) for chart in charts)
    return "" if is_charts else f"returns {charts!r:.60} from Display.curves(settings); return a list of Curve(…)"


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def returned(
    function: Callable[[Any], Iterable[Any]],
    given: object,
    *,
    name: str,
    where: str,
    passes: tuple[type[Exception], ...] = (AlignmentError,),
) -> list[Any]:
    """The list that the function ``Display.NAME`` of a kind returns: tables, or else texts. Raises KindError: the
    function raised, or returned something else. ``where`` names the kind and its package. Raises Exception: those in
    ``passes``, as the function raised them."""
    expected = "ResultTable with a Cell for each column" if name.endswith("tables") else "texts"
    is_expected = _is_table if name.endswith("tables") else lambda value: isinstance(value, str)
    try:
        values = function(given)
        items = [] if isinstance(values, str) else list(values)
        if isinstance(values, str) or not all(map(is_expected, items)):
            raise TypeError(f"it returned {values!r:.60}, not a list of {expected}")
    except passes:
        raise
    except Exception as error:
        raise KindError(
            f"{name} fails with {_raised(error)}\n  {_location(function, error)}",
            where=where,
            remedy="correct the function and run the same command again; the results are complete and are kept",
        ) from error
    return items


def _is_table(value: object) -> bool:
    try:
        return isinstance(value, ResultTable) and all(
            len(cells) == len(value.columns) and all(isinstance(cell, Cell) for cell in cells)
            for _, cells in value.rows
        )
    except (TypeError, ValueError):  # rows of another form
        return False


def _location(function: Callable[..., object], error: Exception) -> str:
    """``FILE, line 12``: the innermost line of the kind's own code, or else where the function begins."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without ``returned``
    if frames:
        folder = Path(frames[0].filename).parent
        frame = next(frame for frame in reversed(frames) if Path(frame.filename).is_relative_to(folder))
        return f"{frame.filename}, line {frame.lineno}"
    code = getattr(function, "__code__", None)
    return repr(function) if code is None else f"{code.co_filename}, line {code.co_firstlineno}"
