"""Checks scorers while planning: whether each is valid, which code it runs, and what a fingerprint covers of it.

A user's file is parsed, never imported: planning does not run it.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from alignment.config.faults import Fault, nearest, suggestion, unread_faults, unread_notes, with_scheme
from alignment.config.scoring import (
    Combine,
    EnsembleConfig,
    MemberConfig,
    MetricConfig,
    ScorerConfig,
    ScoreSourceConfig,
    ServerApi,
    ServerConfig,
)
from alignment.config.stage import StageConfig
from alignment.core.errors import DataError
from alignment.core.fingerprint import file_sha256
from alignment.data.records import HasRow, Question
from alignment.data.source_files import bundled_code, next_to_recipe
from alignment.evaluation.endpoint_client import api_key, client_missing, endpoint_faults, scale_faults
from alignment.rewards.rules.all_rules import RULES, rule_of
from alignment.rewards.scorer_sources import (
    CHOICE,
    ENSEMBLE,
    GRADE,
    GROUPS,
    REWARD,
    FunctionSource,
    function_of,
    is_known,
    is_reference,
    source_field,
)
from alignment.rewards.server_apis import APIS, NUMBERED
from alignment.stages.registry import kind_of


def group_faults(where: str, scorer: ScoreSourceConfig, *, hang_seconds: float) -> Iterator[Fault]:
    """A group that is missing or has no effect, and everything wrong inside the one that counts."""
    for source, name in GROUPS.items():
        group = getattr(scorer, name, None)
        if source == scorer.source and group is None:
            yield Fault(where=f"{where}.{name}", message=f"missing; '{source}' needs it")
        elif source != scorer.source and group is not None:
            message = f"has no effect; only the source '{source}' uses it, but source is '{scorer.source}'"
            yield Fault(where=f"{where}.{name}", message=message)
        elif group is not None:
            yield from _inside(f"{where}.{name}", scorer, hang_seconds)


def refuse_missing_keys(stage: StageConfig, where: str) -> None:
    """Does nothing if the environment has the keys of all servers that the stage's scorers ask. Raises ConfigError: a
    variable is not set."""
    for field, scorer in kind_of(stage).scorers(stage).items():
        if scorer.server is not None:
            api_key(scorer.server.api_key_env, where=f"{where}.{field}.server.api_key_env")
        if isinstance(scorer, MemberConfig) and scorer.grader is not None:
            api_key(scorer.grader.endpoint.api_key_env, where=f"{where}.{field}.grader.endpoint.api_key_env")


def _inside(path: str, scorer: ScoreSourceConfig, hang_seconds: float) -> Iterator[Fault]:
    if scorer.server is not None:
        yield from _server_faults(scorer.server, path, hang_seconds)
    elif isinstance(scorer, MemberConfig) and scorer.grader is not None:
        yield from endpoint_faults(scorer.grader.endpoint, f"{path}.endpoint", hang_seconds=hang_seconds)
        yield from scale_faults(scorer.grader, path)
    elif isinstance(scorer, ScorerConfig) and scorer.ensemble is not None:
        yield from _ensemble_faults(scorer.ensemble, path)
        return
    if message := client_missing(scorer.source):
        yield Fault(where=path, message=message)


def _server_faults(server: ServerConfig, path: str, hang_seconds: float) -> Iterator[Fault]:
    yield from endpoint_faults(server, path, hang_seconds=hang_seconds)
    api, name = APIS[server.api], server.api.value
    if server.label is not None and not api.labels:
        readers = ", ".join(f"'{other.value}'" for other in ServerApi if APIS[other].labels)
        yield Fault(where=f"{path}.label", message=f"has no effect; only {readers} use it, but api is '{name}'")
    elif server.label is not None and server.api in NUMBERED and not server.label.isdecimal():
        message = f"{server.label!r} is not the number of a class; '{name}' numbers them from 0, as in label: '1'"
        yield Fault(where=f"{path}.label", message=message)
    if api.single:
        readers = "an api whose calls can have several answers"
        yield from unread_notes(server, ServerConfig(), ("batch_size",), path, readers)


def _ensemble_faults(ensemble: EnsembleConfig, path: str) -> Iterator[Fault]:
    if len(ensemble.members) < 2:
        message = f"an ensemble of {len(ensemble.members)} has nothing to combine; list 2 or more scorers"
        yield Fault(where=f"{path}.members", message=message)
    if ensemble.combine is not Combine.mean_minus_std:
        reader = f"only combine '{Combine.mean_minus_std.value}'"
        yield from unread_faults(ensemble, EnsembleConfig(), ("std_weight",), path, reader)


ALLOWED = (
    f"allowed: {REWARD}, a reward model (stage:NAME, path:FOLDER), FILE.py:FUNCTION, bundled:NAME.py:FUNCTION, or one "
    f"of: {', '.join((*GROUPS, *RULES))}"
)
_NOT_HERE = {
    GRADE: "is only for scorers of a policy's answers and for metrics of an evaluation; use a server here",
    ENSEMBLE: "is only for scorers of a stage; it cannot be a metric, a rule or a member of another ensemble",
}
"""Why a source that is a group of settings is refused where there is no such group."""
_CHOICES = f"{CHOICE} needs a question with texts to choose from: {Question.EXAMPLE}"


def faults(stages: Mapping[str, StageConfig], *, hang_seconds: float, recipe_folder: Path | None = None) -> list[Fault]:
    """Everything wrong with the scorers of a run, whose recipe is in ``recipe_folder``. A stage that makes no progress
    for ``hang_seconds`` is stopped; 0 turns this off."""
    return [
        fault
        for name, stage in stages.items()
        for field, scorer in kind_of(stage).scorers(stage).items()
        for fault in _scorer_faults(f"stages.{name}.{field}", scorer, hang_seconds, recipe_folder)
    ]


def functions(stage: StageConfig) -> dict[str, FunctionSource]:
    """The user's functions that a stage runs, by the field that names each."""
    scorers = kind_of(stage).scorers(stage)
    named = {source_field(field): function_of(scorer.source) for field, scorer in scorers.items()}
    return {field: function for field, function in named.items() if function is not None}


def code(stage: StageConfig) -> dict[str, str]:
    """The SHA-256 of each function's file, by field. Call ``faults`` first."""
    return {field: file_sha256(function.file) for field, function in functions(stage).items()}


def with_files(stage: StageConfig) -> StageConfig:
    """The stage with absolute file names, because its worker may run in another folder."""
    named = {field: function_of(scorer.source) for field, scorer in kind_of(stage).scorers(stage).items()}
    sources = {field: str(function) for field, function in named.items() if function is not None}
    changed: StageConfig = _with_sources(stage, sources)
    return changed


def without_paths(stage: StageConfig) -> StageConfig:
    """The stage as its identity holds it: only a function's name, and ``model`` for a model. Their content is hashed
    elsewhere."""
    scorers = kind_of(stage).scorers(stage)
    changed: StageConfig = _with_sources(stage, {field: _kind(scorer.source) for field, scorer in scorers.items()})
    return changed


def _with_sources(config: Any, sources: Mapping[str, str]) -> Any:
    """The settings with these sources, by the field of each scorer, such as ``scorers[0]`` or ``guard.scorer``."""
    for field, source in sources.items():
        config = _with_source(config, field.split("."), source)
    return config


def _with_source(group: Any, keys: Sequence[str], source: str) -> Any:
    """The group with another ``source`` at the end of ``keys``, of which some name an item of a list."""
    if not keys:
        return dataclasses.replace(group, source=source)
    name, _, number = keys[0].removesuffix("]").partition("[")
    value = getattr(group, name)
    if not number:
        return dataclasses.replace(group, **{name: _with_source(value, keys[1:], source)})
    items = list(value)
    items[int(number)] = _with_source(items[int(number)], keys[1:], source)
    return dataclasses.replace(group, **{name: items})


def _kind(source: str) -> str:
    function = function_of(source)
    if function is not None:
        return f"function {function.name}"
    return "model" if is_reference(source) else source


def row_checks(stage: StageConfig) -> tuple[Callable[[HasRow], object], ...]:
    """Checks for what the stage's rules read in a row; each raises DataError if a row lacks it. Call ``faults``
    first."""
    scorers = kind_of(stage).scorers(stage).values()
    rules = [rule_of(scorer) for scorer in scorers]
    checks: list[Callable[[HasRow], object]] = [rule.expected for rule in rules if rule is not None]
    if any(scorer.source == CHOICE for scorer in scorers):
        checks.append(_has_choices)
    return tuple(checks)


def _has_choices(record: HasRow) -> None:
    if len(getattr(record, "choices", ())) > len(ascii_uppercase):
        raise DataError(f"'choices' has more than {len(ascii_uppercase)}", where=record.where, remedy=_CHOICES)
    if not getattr(record, "choices", ()):
        raise DataError("'choices' is missing, or no choice is marked as the best", where=record.where, remedy=_CHOICES)


def _scorer_faults(
    where: str, scorer: ScoreSourceConfig, hang_seconds: float, recipe_folder: Path | None
) -> Iterator[Fault]:
    if not scorer.source:
        yield Fault(where=f"{where}.source", message=f"missing; {ALLOWED}")
        return
    if scorer.source in (CHOICE, GRADE) and isinstance(scorer, MetricConfig):
        yield from _setting_faults(where, scorer)
        return
    problem = _source_problem(scorer, recipe_folder)
    if problem:
        yield Fault(where=f"{where}.source", message=problem)
    if not is_known(scorer.source) or (problem and scorer.source in GROUPS):
        return  # its settings are unknown
    yield from _setting_faults(where, scorer)
    yield from group_faults(where, scorer, hang_seconds=hang_seconds)
    rule = RULES.get(scorer.source)
    if rule is None:
        return
    if rule.package is not None and (missing := rule.package.missing()):
        yield Fault(where=f"{where}.source", message=f"'{scorer.source}' {missing}")
    elif problem := rule.fault(scorer):
        yield Fault(where=f"{where}.{rule.setting}", message=problem)


def _setting_faults(where: str, scorer: ScoreSourceConfig) -> Iterator[Fault]:
    for name, rule in RULES.items():
        if rule.setting is None:
            continue
        value = getattr(scorer, rule.setting)
        if name == scorer.source and rule.needs and value is None:
            yield Fault(where=f"{where}.{rule.setting}", message=f"missing; '{name}' needs it")
        elif name != scorer.source and value is not None:
            yield Fault(where=f"{where}.{rule.setting}", message=f"{value!r:.60} has no effect; only '{name}' uses it")


def _source_problem(scorer: ScoreSourceConfig, recipe_folder: Path | None) -> str | None:
    source = scorer.source
    function = function_of(source)
    if function is not None:
        if not function.bundled and not function.file.exists():
            written = source.rpartition(":")[0]
            advice = next_to_recipe(written, recipe_folder, form=f"{{file}}:{function.name}")
            return f"no file {function.file}{f'; {advice}' if advice else ''}"
        return _function_problem(function)
    if source in GROUPS and not hasattr(scorer, GROUPS[source]):
        return f"{source!r} {_NOT_HERE[source]}"
    if is_known(source):
        return None
    if source == CHOICE:
        return f"{source!r} scores a policy rather than answers, so it can only be a metric of an evaluation"
    if source.endswith(".py"):
        return f"{source!r} does not name a function; write {source}:FUNCTION"
    close = nearest(source, [REWARD, CHOICE, *GROUPS, *RULES])
    hint = f"did you mean {close!r}? " if close else ""
    return f"{source!r} is not a scorer; {with_scheme(source) or f'{hint}{ALLOWED}'}"


def _function_problem(function: FunctionSource) -> str | None:
    if function.bundled and function.bundled not in (known := bundled_code()):
        return f"no bundled file '{function.bundled}'; {suggestion(function.bundled, known)}"
    try:
        tree = ast.parse(function.file.read_bytes(), filename=str(function.file))
    except OSError as error:
        return f"{function.file} cannot be read: {error.strerror}"
    except SyntaxError as error:
        return f"{function.file} is not Python: line {error.lineno}: {error.msg}"
    except ValueError as error:
        return f"{function.file} is not Python: {error}"
    defined = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    node = defined.get(function.name)
    if node is None:
        return f"{function.file} defines no function '{function.name}'; {suggestion(function.name, defined)}"
    if isinstance(node, ast.AsyncFunctionDef):
        return f"'{function.name}' is async, but it must be an ordinary function"
    if not node.decorator_list and not _takes_three(node.args):
        return f"'{function.name}' cannot be called as {function.name}(prompts, completions, rows)"
    return None


def _takes_three(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    required = positional - len(arguments.defaults)
    enough = positional >= 3 or arguments.vararg is not None
    return required <= 3 and enough and all(default is not None for default in arguments.kw_defaults)
