"""A Python function as a scorer (docs/rewards.md). A user's file runs with the rights of the user of the stage."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from alignment.core.errors import DataError, RewardError
from alignment.core.files import disk_error
from alignment.core.fingerprint import digest, file_sha256
from alignment.rewards.scorer_sources import FunctionSource
from alignment.rewards.scorers import Answers, locations_of, optional_scores_from, scores_from

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")
_imported: dict[Path, dict[str, ModuleType]] = {}
"""What the files of each folder have imported from it."""


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """While the block runs, modules in ``folder`` can be imported, each once per process; installed modules come first.
    If folders of other such files are on the path of Python, they come after ``folder`` meanwhile. What the block puts
    on the path stays there."""
    folder = folder.resolve()
    modules = _imported.setdefault(folder, {})
    known = set(sys.modules)
    sys.modules.update(modules)
    path = list(sys.path)
    others = [entry for entry in path if Path(entry or ".").resolve() in _imported.keys() - {folder}]
    sys.path[:] = [*(entry for entry in path if entry not in others), str(folder), *others]
    before = set(sys.path)
    try:
        yield
    finally:
        sys.path[:] = [*(entry for entry in sys.path if entry not in before), *path]
        imported = {name: module for name, module in dict(sys.modules).items() if name not in known}
        modules |= {name: module for name, module in imported.items() if _is_beside(folder, name, module)}
        for name in modules:
            sys.modules.pop(name, None)


def _is_beside(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether the module, or the package that it is in, stands in ``folder``, by symlinks or not."""
    file, package = getattr(module, "__file__", None), folder / name.partition(".")[0]
    paths = (Path(file), Path(file).parent.resolve() / Path(file).name) if file else ()
    return any(path.with_suffix("") == package or package in path.parents for path in paths)


def with_modules_beside(folder: Path, function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The function, with the modules of ``folder`` importable whenever it is called."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        with importable(folder):
            return function(*args, **kwargs)

    return call


Function = Callable[[list[list[dict[str, str]]], list[str], list[dict[str, Any]]], Any]


@dataclass(eq=False)
class FunctionScorer:
    """Calls ``function(prompts, completions, rows)`` once per batch. ``prompts`` are lists of ``{"role", "content"}``
    messages, ``completions`` are texts, ``rows`` the JSON rows of the data file; all are copies, so that a function may
    change them."""

    source: FunctionSource
    function: Function

    def scores(self, answers: Answers) -> Tensor:
        """``[answers]`` float64: what the function returns. Raises RewardError: it raised, or did not return one usable
        number per answer; names the line or the row."""
        return scores_from(self._returned(answers), answers, source=str(self.source))

    def optional_scores(self, answers: Answers) -> list[float | None]:
        """As ``scores``, but None for an answer to a row to which the function, a metric, does not apply."""
        return optional_scores_from(self._returned(answers), answers, source=str(self.source))

    def _returned(self, answers: Answers) -> Any:
        prompts = [[copy.deepcopy(message.as_dict()) for message in prompt.messages] for prompt in answers.prompts]
        rows = [copy.deepcopy(dict(prompt.row)) for prompt in answers.prompts]
        try:
            return self.function(prompts, list(answers.texts), rows)
        except BaseException as error:  # a user's function may raise anything, even SystemExit
            if _is_ours(error) or disk_error(error, folder=self.source.file.parent):
                raise
            when = f"called for answers to {answers.locations()}{_lacking(error, answers)}"
            raise _raised(error, self.source, when) from error


def load_function(source: FunctionSource, *, planned: str | None) -> Function:
    """The function; its file is imported once per process. ``planned`` is the file's SHA-256 when the run was planned.
    The file can import modules in its own folder; installed modules come first. The function of another folder's file
    finds its own, whatever their names. Raises DataError: the file has changed since then; RewardError: the file cannot
    be imported, or does not define the function."""
    sha256 = file_sha256(source.file)
    if planned is not None and sha256 != planned:
        raise DataError(
            "changed since the run was planned", where=str(source.file), remedy="start the run again to plan it again"
        )
    function = getattr(_module(source, sha256), source.name, None)
    if not callable(function):
        raise RewardError(f"defines no function '{source.name}'", where=str(source.file))
    checked: Function = with_modules_beside(source.file.parent, function)
    return checked


def _module(source: FunctionSource, sha256: str) -> ModuleType:
    name = f"_reward_{digest([str(source.file), sha256])[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source.file)
    assert spec is not None, "the file ends in .py"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles in the file look it up there
    try:
        with importable(source.file.parent):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if _is_ours(error):
            raise
        raise _raised(error, source, "while its file was imported") from error
    return module


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error, such as a request to stop that arrived meanwhile. In a worker no signal
    raises ``KeyboardInterrupt``, so that one comes from the user's function."""
    return type(error).__module__.startswith("alignment.")


def _lacking(error: BaseException, answers: Answers) -> str:
    column = error.args[0] if isinstance(error, KeyError) and error.args else None
    lacking = [prompt for prompt in answers.prompts if column not in prompt.row] if isinstance(column, str) else []
    return f"; these rows have no '{column}': {locations_of(lacking)}" if lacking else ""


def _raised(error: BaseException, source: FunctionSource, when: str) -> RewardError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(source.file)]
    detail = f": {error}" if str(error) else ""
    at = f" at line {lines[-1]}" if lines else ""
    return RewardError(
        f"raised {type(error).__name__}{detail}{at}, {when}; none of its scores was used",
        where=str(source),
        remedy="fix the function and run again; the stage then starts from the beginning, because its code has changed",
    )
