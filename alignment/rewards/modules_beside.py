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

    Modules beside other files come after these, if their folder is on the path anyway. Afterwards nobody finds those in
    ``folder``. Other folders that the block puts on the path stay there.
    """
    folder, path = folder.resolve(), list(sys.path)
    modules = _imported.setdefault(folder, {})
    beside_files = [entry for entry in path if _resolved(entry) in _imported]
    known = {_package(name) for name in sys.modules}
    sys.modules.update(modules)
    before = set(sys.modules)
    sys.path[:] = [*(entry for entry in path if entry not in beside_files), str(folder), *beside_files]
    try:
        yield
    finally:
        sys.path[:] = [entry for entry in sys.path if _resolved(entry) not in _imported]
        for index, entry in enumerate(path):
            if entry in beside_files:
                sys.path.insert(index, entry)
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
        if file is None:
            continue
        file = _resolved(file)
        if file.with_suffix("") == folder / package or folder / package in file.parents:
            packages.add(package)
    return packages


def _package(name: str) -> str:
    """``"helpers.text"`` → ``"helpers"``."""
    return name.partition(".")[0]


def _resolved(path: str | Path) -> Path:
    """Without symlinks; an empty entry of the path of Python is the working folder."""
    return Path(path or ".").resolve()
