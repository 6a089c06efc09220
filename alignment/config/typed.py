"""Converts plain values to dataclasses and back, and reports every fault at once.

Types are strict: ``true`` is not a number and ``"16"`` is not an integer. Two exceptions are accepted for a float: an
integer, and ``"1e-4"``, which YAML 1.1 reads as text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any

from alignment.config.data import SourceConfig
from alignment.config.faults import Fault, nearest, refuse, suggestion
from alignment.config.foreign_keys import FOREIGN
from alignment.config.rules import NAME, is_name, rule_of
from alignment.config.run import RunConfig
from alignment.config.stage import StageClasses, StageConfig
from alignment.config.sweep import SweepConfig

_SHOWN = 3
_NOTHING = ("none", "nil")
"""How other languages write null."""
_SHOWN_CHARACTERS = 300
_LARGEST_BITS = 63
"""Of a whole number; other programs hold no larger one."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class _Wrong(Exception):
    """A value that cannot be converted; carries what is allowed."""


def typed(tree: Mapping[str, Any], stages: StageClasses) -> RunConfig:
    """The run that a composed tree describes; ``stages`` are the dataclasses of the kinds of stage, by name. Raises
    ConfigError: lists every unknown key, wrong type and value out of range, with its dotted path."""
    config, faults = convert(tree, stages)
    refuse(faults)
    return config


def convert(tree: Mapping[str, Any], stages: StageClasses) -> tuple[RunConfig, list[Fault]]:
    """As ``typed``, but returns the faults; a faulty field holds its default, so that later checks can run."""
    conversion = _Conversion(stages)
    return conversion.instance(RunConfig, tree, where="", defaults=RunConfig(name="run")), conversion.faults


def stage_from_plain(plain: Mapping[str, Any], stages: StageClasses) -> StageConfig:
    """The stage that a ``stage.yaml`` describes under ``config``. Raises ConfigError: lists every fault."""
    conversion = _Conversion(stages)
    stage = conversion.stage(plain, where="config", siblings=[])
    refuse(conversion.faults)
    assert stage is not None, "a stage without a type is a fault"
    return stage


def sweep_from_plain(plain: Any, *, where: str) -> SweepConfig:
    """The sweep that a file describes. Raises ConfigError: lists every fault."""
    conversion = _Conversion(StageClasses(), root="sweep")
    sweep: SweepConfig = conversion.instance(SweepConfig, plain, where="", defaults=SweepConfig())
    refuse([Fault(where=f"{where}: {fault.where}", message=fault.message) for fault in conversion.faults])
    return sweep


def source_from_plain(plain: Mapping[str, Any], *, where: str) -> tuple[SourceConfig, list[Fault]]:
    """The data source that these settings describe, and the faults in them; a faulty field holds its default."""
    conversion = _Conversion(StageClasses())
    source: SourceConfig = conversion.instance(SourceConfig, plain, where=where, defaults=SourceConfig())
    return source, conversion.faults


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts and enums as their values, so that JSON and YAML can hold them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


class _Conversion:
    """Converts a tree to dataclasses and collects the faults; ``root`` names the tree in faults at its top."""

    def __init__(self, stages: StageClasses, root: str = "recipe") -> None:
        self._classes = stages
        self._root = root
        self.faults: list[Fault] = []

    def instance(self, cls: type, tree: Any, *, where: str, defaults: Any) -> Any:
        """An instance of ``cls``; keys that ``tree`` leaves out keep their value from ``defaults``."""
        hints = field_types(cls)
        if not isinstance(tree, Mapping):
            self._fault(where, f"{tree!r} is not a group of settings; it takes the keys {', '.join(hints)}")
            return defaults
        values = {name: getattr(defaults, name) for name in hints}
        values |= getattr(cls, "DEFAULTS_OF_KIND", {}).get(str(tree.get("kind")), {})
        for key, value in tree.items():
            path = _join(where, key)
            if key not in hints:
                self._unknown(cls, key, value, where=where, siblings=tree)
            elif cls is RunConfig and key == "stages":
                values[key] = self._stages(value)
            else:
                values[key] = self._field(cls, key, value, where=path, default=values[key])
        return cls(**values)

    def _unknown(self, cls: type, key: Any, value: Any, *, where: str, siblings: Mapping[Any, Any]) -> None:
        """Suggests deeper paths: ``lr`` of a stage belongs to ``optim``, ``adapter.rank`` of a run to its stages."""
        deeper = list(paths_below(cls))
        if cls is RunConfig and isinstance(stages := siblings.get("stages"), Mapping):
            deeper += self._paths_of_stages(stages)
        own_hints: Mapping[str, str] = getattr(cls, "HINTS", {})
        leaves = {_join(str(key), name): item for name, item in value.items()} if isinstance(value, Mapping) else {}
        if not any(_ending_with(leaf, deeper) or leaf in own_hints for leaf in leaves):
            leaves = {str(key): value}
        for leaf, item in leaves.items():
            foreign = {} if _ending_with(leaf, deeper) else FOREIGN  # a sweep has a setting ``stage``
            ours, remark = foreign.get(leaf, (leaf, ""))
            meant = [_join(where, path) for path in _ending_with(ours, deeper)]
            hint = f"did you mean {_either(meant)}?" if meant else suggestion(str(key), field_types(cls))
            if leaf in foreign:
                hint = self._hint_for_foreign(cls, where, ours, meant) + (remark and f" ({remark})")
            elif "." in leaf and leaf == str(key):
                hint = f"in a file, write it nested: {leaf.replace('.', ': {')}: …{'}' * leaf.count('.')}"
            hint = own_hints.get(leaf, hint).replace("{value}", _as_written(item))
            self._fault(_join(where, leaf), f"unknown key; {hint}")

    def _hint_for_foreign(self, cls: type, where: str, ours: str, meant: Sequence[str]) -> str:
        if not ours:
            return "leave it out"
        own = ours.rpartition(".")[2]
        if meant or own in field_types(cls):
            return f"here it is {_either(meant or [_join(where, own)])}"
        if "=" in ours:
            return f"here it is '{ours.replace('=', ': ')}', or {ours} on the command line"
        if where and ours not in paths_below(RunConfig):
            return f"elsewhere it is {ours!r}, which {where} does not have"
        return f"here it is {ours!r}"

    def stage(self, tree: Any, *, where: str, siblings: list[str]) -> StageConfig | None:
        if not isinstance(tree, Mapping):
            close = nearest(tree, self._classes) if isinstance(tree, str) else None
            hint = f"; did you mean {{kind: {close}}}?" if close else ""
            self._fault(where, f"{tree!r} is not a stage; it takes settings, beginning with 'kind'{hint}")
            return None
        if "kind" not in tree:
            self._fault(where, _without_kind(where.removeprefix("stages."), siblings, self._classes))
            return None
        kind = tree["kind"]
        cls = self._classes.get(kind) if isinstance(kind, str) else None
        if cls is None:
            known = f"is not a kind of stage; {suggestion(str(kind), self._classes)}"
            self._fault(f"{where}.kind", f"{kind!r} {self._classes.problems.get(str(kind), known)}")
            return None
        built: StageConfig = self.instance(cls, tree, where=where, defaults=cls())
        return built

    def _stages(self, tree: Any) -> dict[str, StageConfig]:
        if not isinstance(tree, Mapping):
            self._fault("stages", f"{tree!r} is not a group of stages; write {{NAME: {{kind: KIND}}}}")
            return {}
        if not tree:
            self._fault("stages", "a run needs at least one stage")
        complete = [str(name) for name, value in tree.items() if isinstance(value, Mapping) and "kind" in value]
        stages = {}
        for name, value in tree.items():
            where = _join("stages", name)
            if not is_name(str(name)):
                self._fault(where, f"{str(name)!r} cannot name a stage; allowed: {NAME.allowed}")
            stage = self.stage(value, where=where, siblings=complete)
            if stage is not None:
                stages[str(name)] = stage
        return stages

    def _field(self, cls: type, name: str, value: Any, *, where: str, default: Any) -> Any:
        hint = field_types(cls)[name]
        if isinstance(value, str) and value.lower() in _NOTHING and _may_be_null(hint):
            self._fault(where, f"{value!r} is a text here; write null")
            return default
        if (group := group_of(hint)) is not None:
            if value is None and group is not hint:
                return None
            return self.instance(group, value, where=where, defaults=group() if default is None else default)
        if kinds := kinds_of(hint):
            return self._of_kind(kinds, value, where=where, default=default)
        item, rule = listed_dataclass(hint), rule_of(cls, name)
        shown = "the given value (not shown)" if rule is not None and rule.secret else _shown(value)
        try:
            converted = _scalar_or_list(hint, value) if item is None else self._instances(item, value, where=where)
        except _Wrong as wrong:
            self._fault(where, f"{shown} is not allowed; {wrong}")
            return default
        if rule is not None and converted is not None and not rule.holds(converted):
            self._fault(where, f"{shown} is not allowed; {rule.allowed}")
            return default
        return converted

    def _of_kind(self, kinds: Mapping[str, type], tree: Any, *, where: str, default: Any) -> Any:
        group = where.replace(".", "/")
        if not isinstance(tree, Mapping):
            kind = nearest(str(tree), kinds) or "KIND"
            hint = f"choose {group}={kind}, or write {{kind: {kind}}}"
            self._fault(where, f"{tree!r} is not a group of settings; {hint}")
            return default
        kind = tree.get("kind", default.kind)
        cls = kinds.get(kind) if isinstance(kind, str) else None
        if cls is None:
            self._fault(f"{where}.kind", f"{kind!r} is not allowed; {suggestion(str(kind), kinds)}")
            return default
        own = {}
        for key, value in tree.items():
            owners = [f"{group}={other}" for other in kinds if key in field_types(kinds[other])]
            if owners and key not in field_types(cls):
                self._fault(_join(where, key), f"kind '{kind}' has no such setting; {' or '.join(owners)} has it")
            else:
                own[key] = value
        return self.instance(cls, own, where=where, defaults=default if type(default) is cls else cls())

    def _instances(self, cls: type, value: Any, *, where: str) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            keys = [f"{key}: {_as_written(item)}" for key, item in value.items()] if isinstance(value, Mapping) else []
            example = f"; write [{{{', '.join(keys)}}}]" if keys else ""
            raise _Wrong(
                f"it takes a list of groups, each with some of the keys {', '.join(field_types(cls))}{example}"
            )
        return [
            self.instance(cls, item, where=f"{where}[{number}]", defaults=cls()) for number, item in enumerate(value)
        ]

    def _paths_of_stages(self, stages: Mapping[Any, Any]) -> list[str]:
        kinds = {name: str(tree.get("kind")) for name, tree in stages.items() if isinstance(tree, Mapping)}
        known = {name: self._classes[kind] for name, kind in kinds.items() if kind in self._classes}
        return [f"stages.{name}.{path}" for name, cls in known.items() for path in paths_below(cls)]

    def _fault(self, where: str, message: str) -> None:
        self.faults.append(Fault(where=where or self._root, message=message))


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Each field of a dataclass with its resolved type, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def paths_below(cls: type) -> Iterator[str]:
    """Dotted paths of all settings of a dataclass, including nested ones, but not those inside lists."""
    for name, hint in field_types(cls).items():
        yield name
        group = group_of(hint)
        inner = kinds_of(hint).values() if group is None else [group]
        yield from dict.fromkeys(f"{name}.{path}" for cls_inside in inner for path in paths_below(cls_inside))


def _ending_with(leaf: str, paths: Sequence[str]) -> list[str]:
    ending = [path for path in paths if f".{path}".endswith(f".{leaf}")]
    return [path for path in ending if path.count(".") == min(option.count(".") for option in ending)]


def _either(names: Sequence[str]) -> str:
    *others, last = [f"'{name}'" for name in names[:_SHOWN]]
    return f"{', '.join(others)} or {last}" if others else last


def group_of(hint: Any) -> type | None:
    """The dataclass of a field that holds a group of settings, or a group or None; otherwise None."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    classes = _dataclasses_of(hint)
    return classes[0] if len(classes) == 1 and types.NoneType in typing.get_args(hint) else None


def kinds_of(hint: Any) -> dict[str, type]:
    """The dataclasses of a field that holds one of several, by their ``kind``; empty for any other field."""
    classes = _dataclasses_of(hint)
    return {str(_default_of(cls, "kind")): cls for cls in classes} if len(classes) > 1 else {}


def _dataclasses_of(hint: Any) -> list[type]:
    return [cls for cls in typing.get_args(hint) if isinstance(cls, type) and dataclasses.is_dataclass(cls)]


def _default_of(cls: type, name: str) -> Any:
    return getattr(cls(), name)


def listed_dataclass(hint: Any) -> type | None:
    """The dataclass that a field lists, if it is a list of dataclasses."""
    items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return items[0] if items and dataclasses.is_dataclass(items[0]) and isinstance(items[0], type) else None


def _may_be_null(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _scalar_or_list(hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and _may_be_null(hint):
            return None
        return _any_of([option for option in options if option is not types.NoneType], value)
    if typing.get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            raise _Wrong("it takes a list, such as [a, b]")
        return [_scalar_or_list(typing.get_args(hint)[0], item) for item in value]
    if typing.get_origin(hint) is dict:
        inner = typing.get_args(hint)[1]
        if not isinstance(value, Mapping):
            raise _Wrong("it takes names and texts, such as {name: text}" if inner is str else "it takes a group")
        return {str(key): _scalar_or_list(inner, item) for key, item in value.items()}
    if hint is Any:
        return _json(value)
    if issubclass(hint, Enum):
        return _choice(hint, value)
    return _scalar(hint, value)


def _any_of(options: Sequence[Any], value: Any) -> Any:
    reasons = []
    for option in options:
        try:
            return _scalar_or_list(option, value)
        except _Wrong as wrong:
            reasons.append(str(wrong))
    raise _Wrong(", or ".join(reasons))


def _scalar(hint: type, value: Any) -> Any:
    if hint is float:
        return _number(value)
    if type(value) is not hint:
        raise _Wrong(f"it takes {_WORDS[hint]}")
    if type(value) is int and value.bit_length() > _LARGEST_BITS:
        raise _Wrong(f"it takes a whole number of at most {_LARGEST_BITS} bits")
    return value


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise _Wrong(f"{value!r:.60} inside it is not JSON; write it as text, in quotes")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise _Wrong(f"it takes {_WORDS[float]}")
    try:
        return float(value)
    except ValueError:
        raise _Wrong(f"it takes {_WORDS[float]}") from None
    except OverflowError:
        raise _Wrong(f"it takes {_WORDS[float]} of at most {sys.float_info.max:.2g}") from None


def _choice(hint: type[Enum], value: Any) -> Enum:
    options = [member.value for member in hint]
    for member in hint:
        if member.value == value:
            return member
    close = nearest(str(value), options)
    hint_text = f"; did you mean '{close}'?" if close else ""
    raise _Wrong(f"one of: {', '.join(options)}{hint_text}")


def _without_kind(name: str, siblings: list[str], kinds: Iterable[str]) -> str:
    close = nearest(name, siblings)
    if close:
        return f"unknown stage; did you mean '{close}'?"
    have = f"the recipe has {', '.join(siblings)}" if siblings else "the recipe has none"
    return f"unknown stage; {have}. A new stage needs 'kind', one of: {', '.join(kinds)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _as_written(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
