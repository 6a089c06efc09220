"""Modules beside a user's file. Files of different folders may each have a module of the same name."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")
_imported: dict[Path, dict[str, ModuleType]] = {}
"""What the files of each folder have imported from it."""


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """While the block runs, modules in ``folder`` can be imported, each once per process; installed modules come first.

    If folders of other such files are on the path of Python, they come after ``folder`` meanwhile. What the block puts
    on the path stays there.
    """
    folder = folder.resolve()
    modules = _imported.setdefault(folder, {})
    known = {_package(name) for name in dict(sys.modules)}
    sys.modules.update(modules)
    before = set(dict(sys.modules))
    try:
        with _in_front_of_others(folder):
            yield
    finally:
        imported = {name: module for name, module in dict(sys.modules).items() if name not in before}
        packages = _packages_of(folder, imported) - known
        modules |= {name: module for name, module in imported.items() if _package(name) in packages}
        for name in modules:
            sys.modules.pop(name, None)


def with_modules_beside(folder: Path, function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The function, with the modules of ``folder`` importable whenever it is called."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        with importable(folder):
            return function(*args, **kwargs)

    return call


@contextmanager
def _in_front_of_others(folder: Path) -> Iterator[None]:
    """Puts ``folder`` at the end of the path of Python, and the folders of other files behind it."""
    own, path = str(folder), list(sys.path)
    others = [entry for entry in path if Path(entry or ".").resolve() in _imported.keys() - {folder}]
    sys.path[:] = [*(entry for entry in path if entry not in others), own, *others]
    try:
        yield
    finally:
        rest = [entry for entry in sys.path if entry not in others]
        if own in rest:  # unless the user's code has removed it
            del rest[len(rest) - 1 - rest[::-1].index(own)]
        for index, entry in enumerate(path):
            if entry in others:
                rest.insert(index, entry)
        sys.path[:] = rest


def _packages_of(folder: Path, imported: Mapping[str, ModuleType]) -> set[str]:
    """The packages, and the modules without one, that were imported from ``folder``, by symlinks or not."""
    packages = set()
    for name, module in imported.items():
        file = getattr(module, "__file__", None)
        if file is None:
            continue
        package, path = folder / _package(name), Path(file)
        for candidate in (path, path.parent.resolve() / path.name, path.resolve()):
            if candidate.with_suffix("") == package or package in candidate.parents:
                packages.add(_package(name))
    return packages


def _package(name: str) -> str:
    """``"helpers.text"`` → ``"helpers"``."""
    return name.partition(".")[0]
