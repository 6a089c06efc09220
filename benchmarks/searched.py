"""``rivals-WORK.json``: every setting of the rivals that a search tried, and the ones that it chose.

A table takes its contestants from this file, and refuses one that does not describe this machine and these libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.grid import Setting, declared
from benchmarks.machine import contestant_sha256
from benchmarks.setting import read_json
from benchmarks.work import Work


class NoSearch(Exception):
    """There is no search that a table could take its rivals from; the message says why, and what to do."""


def search_file(results: Path, name: str, *, amx: bool) -> Path:
    """Where the search of a work is written."""
    return results / f"rivals-{name}{'' if amx else '-no-amx'}.json"


def write_search(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def grid_of(work: Work) -> dict[str, dict[str, list[Any]]]:
    """The values of each axis of each library."""
    return {library: declared(rival.axes) for library, rival in work.rivals.items()}


def code_of(work: Work) -> dict[str, str]:
    """A hash of the code with which each library does the work."""
    return {library: contestant_sha256(rival.template.module) for library, rival in work.rivals.items()}


def fixed_of(work: Work) -> dict[str, dict[str, Any]]:
    """The values of each library that no search changes."""
    return {library: dict(rival.fixed) for library, rival in work.rivals.items()}


def choices_of(
    path: Path,
    name: str,
    work: Work,
    conditions: Mapping[str, Any],
    versions: Mapping[str, Mapping[str, str]],
) -> dict[str, Setting]:
    """The settings that the search of a work chose, by the names of the contestants.

    ``conditions`` are those of the run that wants them. ``versions`` has the installed versions of each library; one
    that is not in it is not compared, as it cannot take part.

    Raises:
        NoSearch: there is no file, or it is of another machine, other rows, other versions, another grid, or other code
            of the rivals.
    """
    remedy = f'search the rivals\' settings here first: make bench WORK={name} ARGS="--search"'
    if not path.is_file():
        raise NoSearch(f"{path.name} is missing; {remedy}")
    searched = read_json(path)
    differing = [
        _difference(condition, searched["conditions"].get(condition), conditions[condition])
        for condition in ("processor", "threads", "amx", "data", "base", "compiler", "launcher")
        if searched["conditions"].get(condition) != conditions[condition]
    ]
    for library, installed in versions.items():
        before = searched["versions"].get(library, {})
        differing += [
            f"{package} of {library}: {before.get(package, 'unknown')} then, {version} now"
            for package, version in installed.items()
            if before.get(package) != version
        ]
    if searched["grid"] != grid_of(work) or searched["fixed"] != fixed_of(work):
        differing.append("the grid of settings has changed since")
    if searched.get("code") != code_of(work):
        differing.append("the code of the rivals has changed since")
    if differing:
        raise NoSearch(f"{path.name} cannot be used: {'; '.join(differing)}. {remedy[0].upper()}{remedy[1:]}")
    chosen: dict[str, Setting] = searched["chosen"]
    return chosen


def _difference(condition: str, before: Any, now: Any) -> str:
    if condition == "processor" and before["model"] != now["model"]:
        before, now = before["model"], now["model"]
    return f"{condition}: {json.dumps(before)} then, {json.dumps(now)} now"
