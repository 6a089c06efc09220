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

    Modules in the folders of other files cannot be imported meanwhile, nor those in ``folder`` afterwards. Folders that
    the block itself puts on the path stay there.
    """
    folder, path = folder.resolve(), list(sys.path)
    modules = _imported.setdefault(folder, {})
    known = {_package(name) for name in sys.modules}
    sys.modules.update(modules)
    before = set(sys.modules)
    sys.path[:] = [*(entry for entry in path if Path(entry or ".").resolve() not in _imported), str(folder)]
    visible = set(sys.path)
    try:
        yield
    finally:
        added = [entry for entry in sys.path if entry not in visible and Path(entry).resolve() != folder]
        sys.path[:] = [*path, *added]
        imported = {name: module for name, module in sys.modules.items() if name not in before}
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


def _packages_of(folder: Path, imported: Mapping[str, ModuleType]) -> set[str]:
    """The packages, and the modules without one, that were imported from ``folder``."""
    packages = set()
    for name, module in imported.items():
        package, file = _package(name), getattr(module, "__file__", None)
        if file and (Path(file).with_suffix("") == folder / package or folder / package in Path(file).parents):
            packages.add(package)
    return packages


def _package(name: str) -> str:
    """``"helpers.text"`` → ``"helpers"``."""
    return name.partition(".")[0]
