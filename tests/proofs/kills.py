"""``align run``, killed at random steps of a stage again and again, ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from alignment.core.artifacts import verify
from alignment.records.worker import PARTS
from tests.e2e.conftest import Align, environment
from tests.living import kill_each
from tests.proofs.common import Claim
from tests.tiny import save_tiny_model

SMALL_BATCHES = ("optim.batch_size=4", "num_minibatches=1")
SPARE = 10  # steps at the end, so that the last kill comes before it
NOT_REPEATED = ("seconds", "time/")
"""Beginnings of the names of figures that differ between two runs of the same."""
PATIENCE = 300.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A stage that is killed.

    ``settings`` are its own, ``before`` stages are made beforehand, all other stages are left out. It logs or stores
    something ``length`` times: a line of figures, or a part of what it samples. ``again`` is how much of that an
    attempt may do again: nothing that was stored.
    """

    recipe: str
    stage: str
    settings: tuple[str, ...]
    left_out: tuple[str, ...]
    length: int
    kills: int
    again: int = 1

    @property
    def overrides(self) -> tuple[str, ...]:
        """Those of a run that makes the stage."""
        return (*self.left_out, *(f"stages.{self.stage}.{setting}" for setting in self.settings))


LATER = ("~stages.evaluate", "~stages.report")
TARGETS = {
    "PPO": Target(
        recipe="quickstart",
        stage="ppo",
        settings=("updates=60", *SMALL_BATCHES),
        left_out=("~stages.dpo", *LATER),
        length=60,
        kills=10,
    ),
    "GRPO": Target(
        recipe="grpo",
        stage="ppo",
        settings=("updates=40", *SMALL_BATCHES, "critic=none"),
        left_out=LATER,
        length=40,
        kills=5,
    ),
    "KTO": Target(
        recipe="kto",
        stage="kto",
        settings=(
            "data.limit=8",
            "max_length=4096",
            "save_every=1",
            "optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3, epochs: 60}",
        ),
        left_out=LATER,
        length=120,
        kills=5,
    ),
    "samples": Target(
        recipe="rejection_sampling",
        stage="sample",
        settings=("data.limit=64", "batch_size=4", "max_prompt_length=4096", "ended_only=false"),
        left_out=("~stages.best", *LATER),
        length=64,
        kills=5,
        again=0,
    ),
}


def run(folder: Path) -> list[Claim]:
    """For each target two runs on the same tiny model: one undisturbed, one with kills."""
    model = save_tiny_model(folder / "tiny")
    return [
        claim for name, target in TARGETS.items() for claim in _claims(folder / name, model, name=name, target=target)
    ]


def _claims(folder: Path, model: Path, *, name: str, target: Target) -> list[Claim]:
    straight, killed = (
        Align(output=folder / output, model=model, recipe=target.recipe) for output in ("straight", "killed")
    )
    for align in (straight, killed):
        align.output.mkdir(parents=True)
        align("run", *target.left_out, f"~stages.{target.stage}")
    straight("run", *target.overrides)
    a_step = _seconds_of_a_step(straight, target)
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, target.length - SPARE), target.kills))
    repeated = [_killed_after(killed, target, step, rng.uniform(0.0, a_step)) for step in steps]
    killed("run", *target.overrides)
    expected, rows = (_rows(align, target) for align in (straight, killed))
    logged = [row["step"] for row in rows if "step" in row]
    differing = sum(wanted != row for wanted, row in zip(expected, rows, strict=False)) + abs(len(expected) - len(rows))
    return [
        Claim(figure=f"{name}: kills after new steps", values=(float(len(repeated)),), at_least=target.kills),
        Claim(figure=f"{name}: most steps made again", values=(float(max(repeated)),), at_most=target.again),
        Claim(figure=f"{name}: files of weights", values=(float(len(killed.weights())),), at_least=2),
        Claim(figure=f"{name}: files of weights that differ", values=(_differing(straight, killed),), at_most=0),
        Claim(figure=f"{name}: rows", values=(float(len(rows)),), at_least=target.length),
        Claim(figure=f"{name}: steps logged twice", values=(float(len(logged) - len(set(logged))),), at_most=0),
        Claim(figure=f"{name}: rows that differ", values=(float(differing),), at_most=0),
    ]


def _seconds_of_a_step(align: Align, target: Target) -> float:
    folder = align.artifact(target.stage)
    if logged := _lines(folder / "metrics.jsonl"):
        return float(logged[-1]["seconds"] - logged[0]["seconds"]) / (len(logged) - 1)
    return verify(folder, content=True).usage["seconds"] / target.length


def _killed_after(align: Align, target: Target, steps: int, seconds: float) -> int:
    """SIGKILL to the driver and all its processes, so long after so many steps were logged or stored.

    Returns how many of those before it did again, having gone on from its checkpoint.
    An attempt logs one step more than those before it at the least, so that it is at work when it is killed.
    """
    before = lowest = _steps(align, target)
    steps = max(steps, before + 1)
    process = subprocess.Popen(
        align.argv("run", *target.overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    begun = time.monotonic()
    while (now := _steps(align, target)) < steps:
        lowest = min(lowest, now)
        _check_runs(process, align)
        if time.monotonic() > begun + PATIENCE:
            raise TimeoutError(f"no step {steps} in {PATIENCE:.0f} s\n{align.logs()}")
        time.sleep(0.01)
    time.sleep(seconds)
    _check_runs(process, align)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    kill_each(everyone)
    process.wait()
    psutil.wait_procs(everyone, timeout=30)
    return before - lowest


def _steps(align: Align, target: Target) -> int:
    """How many lines the stage at work has logged, or parts of samples it has stored."""
    (*_, work) = (None, *align.output.glob(f"artifacts/{target.stage}-*.work"))
    if work is None:
        return 0
    return len(_lines(work / "content/metrics.jsonl")) or len(list((work / "checkpoints").glob(PARTS)))


def _check_runs(process: subprocess.Popen[bytes], align: Align) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed\n{align.logs()}")


def _differing(straight: Align, killed: Align) -> float:
    of_killed, of_straight = killed.weights(), straight.weights()
    return float(sum(of_killed.get(name) != of_straight.get(name) for name in of_killed.keys() | of_straight.keys()))


def _rows(align: Align, target: Target) -> list[dict[str, Any]]:
    """What the stage logged, without what measures time, or what it sampled."""
    folder = align.artifact(target.stage)
    logged = _lines(folder / "metrics.jsonl") or _lines(folder / "samples.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(NOT_REPEATED)} for row in logged]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a stage may be writing the next."""
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")]
