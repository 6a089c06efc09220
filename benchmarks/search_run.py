"""Searches the settings of a work's rivals on this machine: ``python -m benchmarks --works WORK --search``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from benchmarks import search
from benchmarks.figures import figures_of
from benchmarks.grid import GOALS, Axis, Setting
from benchmarks.harness import (
    Options,
    base_model,
    conditions_of,
    prepared,
    python_of,
    refuse_other_code,
    refuse_uncommitted,
    versions_of,
)
from benchmarks.machine import ROOT, compiler
from benchmarks.measurement import SCRATCH, Circumstances, Failed, Measurement, taken
from benchmarks.search import Trial
from benchmarks.searched import code_of, fixed_of, grid_of, search_file, write_search
from benchmarks.setting import SAME_LOSS
from benchmarks.work import Rival, Work
from benchmarks.works import WORKS

TOLERANCE = {"reward": 0.04, "dpo": 0.08}
"""Where equal rows give losses that are further apart than ``SAME_LOSS``: a new head makes small differences of scores,
and in bfloat16 first losses were up to 3.4 % apart. DPO's losses after the first are made of sums of log-probabilities
over whole answers: in bfloat16 settings of one library were up to 5.5 % apart, and two that differ only in rows of a
micro-batch and glibc's memory 5.2 %."""
NEEDS_WARM_UP = ("kto",)
"""Kinds whose first loss says nothing: it is one half for all, and the divergence, which some estimate from
micro-batches, comes in with the second."""
TRIAL_SECONDS = 600
"""A trial that takes longer for each of its steps has failed."""
ROUNDS = {"ppo": 1}
"""Rounds of the second pass, by kind. An update of TRL's PPO takes minutes on two cores."""
_OTHER_ROUNDS = 2
NO_COMPILER = "not tried: torch.compile needs a C++ compiler, and there is none (CXX, g++, clang++, c++)"


def search_work(name: str, options: Options) -> Path:
    """Searches all rivals of a work and writes ``rivals-WORK.json``; returns its path. Stopped, it writes nothing.

    Raises:
        Failed: the work has no rivals to search, rows could not be prepared, the code is not committed or was
            changed meanwhile, or the first setting of a library failed.
    """
    work = WORKS[name]
    if not work.rivals:
        raise Failed("it has no rivals whose settings are searched")
    refuse_uncommitted()
    base = base_model()
    conditions = conditions_of(work, options, base)
    folder = SCRATCH / f"rivals-{name}"
    inputs = prepared(work, replace(options, repetitions=1), base, folder)
    versions = versions_of(work)
    trials: list[dict[str, Any]] = []
    chosen: dict[str, Setting] = {}
    tolerance = TOLERANCE.get(work.kind, SAME_LOSS)
    for library, rival in work.rivals.items():
        if library not in versions:
            raise Failed(f"the environment of {library} could not be built")
        trying = Trying(
            work=work,
            library=library,
            inputs=inputs,
            base=base,
            folder=folder,
            python=python_of(rival.template),
            circumstances=options.circumstances,
            conditions=conditions,
        )
        choices = _chosen(rival, trying, tolerance)
        trials += trying.entries
        for failure in never_ran(rival.axes, trying.entries):
            print(f"  {library}: {failure}", flush=True)
        chosen |= {f"{library}_{goal}": choices[goal] for goal in GOALS}
    shutil.rmtree(folder, ignore_errors=True)
    path = search_file(options.results, name, amx=options.amx)
    content = {
        "work": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of_checkout(ROOT),
        "conditions": conditions,
        "versions": versions,
        "rule": " ".join((search.__doc__ or "").split()),
        "tolerance": tolerance,
        "grid": grid_of(work),
        "fixed": fixed_of(work),
        "code": code_of(work),
        "chosen": chosen,
        "parameters": inputs["models"],
        "counts_of_steps": inputs["repetitions"][0]["steps"],
        "trials": trials,
    }
    write_search(path, content)
    print("\n".join([str(path.name), *(f"  {contestant}: {dict(setting)}" for contestant, setting in chosen.items())]))
    return path


def _chosen(rival: Rival, trying: Trying, tolerance: float) -> dict[str, Setting]:
    """The best setting for each goal."""
    try:
        rounds = ROUNDS.get(trying.work.kind, _OTHER_ROUNDS)
        return search.search(rival.axes, trying.trial, tolerance=tolerance, rounds=rounds)
    except search.CannotStart as reason:
        raise Failed(f"the first setting of {trying.library} failed: {reason}") from reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Trying:
    """Tries settings of one library on the rows of the first repetition. ``entries`` are the trials as a file has them.

    A trial of the first pass measures the first step, without a warm-up unless the kind needs one or code is compiled
    while updates are made.
    """

    work: Work
    library: str
    inputs: dict[str, Any]
    base: Path
    folder: Path
    python: str
    circumstances: Circumstances
    conditions: Mapping[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)

    def trial(self, setting: Setting, final: bool) -> Trial:
        """Measures, or says why not."""
        refuse_other_code(self.conditions)
        measurement = self.measurement(setting, final=final)
        if measurement.compiles and compiler() is None:
            entry: dict[str, Any] = {"error": NO_COMPILER}
        else:
            entry = taken(measurement, self.circumstances)
            if "result" in entry:
                entry["figures"] = self._figures(measurement, entry["result"])
        self.entries.append({"library": self.library, "final": final, "setting": dict(setting), **entry})
        return trial_of(self.work, setting, entry, final=final)

    def measurement(self, setting: Setting, *, final: bool) -> Measurement:
        """The measurement of a setting."""
        how = self.work.rivals[self.library].contestant(setting)
        measurement = Measurement(
            work=self.work,
            name=f"{self.library}-{len(self.entries)}",
            how=how if final else replace(how, measured=1),
            repetition=0,
            inputs=self.inputs,
            base=self.base,
            folder=self.folder,
            python=self.python,
            warm_up=1 if final or self.work.kind in NEEDS_WARM_UP else 0,
        )
        if measurement.compiles and not measurement.steps_while_compiling:
            measurement = replace(measurement, warm_up=1)
        steps = measurement.steps_while_compiling + measurement.steps
        return replace(measurement, limit_seconds=TRIAL_SECONDS * steps)

    def _figures(self, measurement: Measurement, result: Mapping[str, Any]) -> dict[str, float]:
        model = self.inputs["models"]["base"]
        steps = self.inputs["repetitions"][0]["steps"]
        work, sharing = self.work, measurement.how.sharing
        peak, warm_up = result["matmul_peak"], measurement.warm_up
        return figures_of(work.kind, work.adapter, model, steps, result, sharing, peak=peak, warm_up=warm_up)


def trial_of(work: Work, setting: Setting, entry: Mapping[str, Any], *, final: bool) -> Trial:
    """What the rule has to know of an entry. Speed is tokens a second, or updates a second."""
    if "error" in entry:
        return Trial(setting=setting, final=final, failure=entry["error"])
    figures = entry["figures"]
    pace = figures[work.quantity]
    return Trial(
        setting=setting,
        final=final,
        speed=pace if work.quantity == "tokens_per_second" else 1 / pace,
        peak_memory=figures["peak_memory"],
        losses=tuple(entry["result"]["losses"]),
        answers=figures.get("answer_tokens", figures.get("mean_length")),
    )


def never_ran(axes: Sequence[Axis], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each value of an axis that was tried and failed in every trial, with the reason of the last."""
    lines = []
    for axis in axes:
        for value in axis.values:
            tried = [entry for entry in entries if entry["setting"][axis.name] == value]
            if tried and all("error" in entry for entry in tried):
                lines.append(f"no trial with {axis.name}={value} ran: {tried[-1]['error']}")
    return lines
