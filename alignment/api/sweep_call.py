"""``align sweep`` as a function, which calls the same functions of the pipeline as the verb."""

from __future__ import annotations

from alignment.api.calls import Overrides, Recipe, console_of, errors_explained, name_of, raise_if_stopped, words
from alignment.api.loaded_run import Sweep, load_sweep
from alignment.core.errors import StageError
from alignment.pipeline.sweeps.run import run_sweep
from alignment.pipeline.sweeps.sweep_file import read_sweep


def sweep(
    recipe: Recipe,
    sweep: Recipe,
    overrides: Overrides = (),
    *,
    at_once: int = 1,
    retry_failed: bool = False,
    quiet: bool = False,
) -> Sweep:
    """Runs the missing trials of a sweep, and those that failed if ``retry_failed``, and returns all. The command is
    ``align sweep``.

    ``sweep`` is the name of a shipped sweep, or the path of a .yaml file. ``overrides`` hold for every trial.
    ``at_once`` trials run at the same time, each with its share of the machine.

    Raises:
        AlignmentError: as for ``plan``; ConfigError if the sweep does not fit the recipe or the machine, or optuna is
            not installed; Busy if another process works on it; StageError if no trial has ever finished.
        KeyboardInterrupt, Preempted: as for ``run``; the same call continues with the missing trials.
    """
    with errors_explained():
        checked = read_sweep(name_of(recipe), name_of(sweep, "sweep"), words(overrides))
        code = run_sweep(checked, console=console_of(quiet=quiet), at_once=at_once, retry_failed=retry_failed)
        raise_if_stopped(code, checked.folder.name)
        if code:
            remedy = "load_sweep says why each trial failed"
            raise StageError("no trial has finished", where=str(checked.folder), remedy=remedy)
        return load_sweep(checked.folder)
