"""``align run`` killed ten times at random updates of its PPO stage ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.e2e.conftest import Align, environment
from tests.proofs.common import Claim
from tests.tiny import save_tiny_model

KILLS = 10
UPDATES = 60
SPARE = 10  # updates at the end, so that the last kill comes before it
BEFORE = ("~stages.ppo", "~stages.dpo", "~stages.evaluate", "~stages.report")
PPO = (*BEFORE[1:], f"stages.ppo.updates={UPDATES}", "stages.ppo.optim.batch_size=4", "stages.ppo.num_minibatches=1")
STEPS_PER_UPDATE = 2
NOT_REPEATED = ("seconds", "time/")
"""Beginnings of the names of figures that differ between two runs of the same."""
PATIENCE = 300.0


def run(folder: Path) -> list[Claim]:
    """Two runs on the same tiny model: one undisturbed, one with kills."""
    model = save_tiny_model(folder / "tiny")
    straight, killed = (Align(output=folder / name, model=model) for name in ("straight", "killed"))
    for align in (straight, killed):
        align.output.mkdir()
        align("run", *BEFORE)
    straight("run", *PPO)
    an_update = _lines(straight.artifact("ppo"))[-1]["seconds"] / UPDATES
    rng = random.Random(0)
    updates = sorted(rng.sample(range(1, UPDATES - SPARE), KILLS))
    lost = [_killed_after(killed, update, rng.uniform(0.0, an_update)) for update in updates]
    killed("run", *PPO)
    expected = [STEPS_PER_UPDATE * (update + 1) for update in range(UPDATES)]
    found = [line["step"] for line in _metrics(killed)]
    return [
        Claim(figure="kills, each after updates that are new", values=(float(len(lost)),), at_least=KILLS),
        Claim(figure="updates that an attempt did again, at most", values=(float(max(lost)),), at_most=1),
        Claim(figure="files of weights", values=(float(len(killed.weights())),), at_least=3),
        Claim(figure="files of weights that differ", values=(_differing(straight, killed),), at_most=0),
        Claim(figure="updates logged other than once", values=(float(found != expected),), at_most=0),
        Claim(
            figure="updates whose figures differ",
            values=(float(sum(a != b for a, b in zip(_metrics(straight), _metrics(killed), strict=True))),),
            at_most=0,
        ),
    ]


def _killed_after(align: Align, updates: int, seconds: float) -> int:
    """SIGKILL to the driver and all its processes, so long after so many updates were logged.

    Returns how many of those that stood in the log before it did again, having gone on from its checkpoint.
    An attempt logs one update more than those before it at the least, so that it is at work when it is killed.
    """
    before = lowest = _updates(align)
    updates = max(updates, before + 1)
    process = subprocess.Popen(
        align.argv("run", *PPO), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    begun = time.monotonic()
    while (now := _updates(align)) < updates:
        lowest = min(lowest, now)
        _check_runs(process, align)
        if time.monotonic() > begun + PATIENCE:
            raise TimeoutError(f"no update {updates} in {PATIENCE:.0f} s\n{align.logs()}")
        time.sleep(0.01)
    time.sleep(seconds)
    _check_runs(process, align)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone, timeout=30)
    return before - lowest


def _updates(align: Align) -> int:
    """How many updates the stage at work has logged."""
    return sum(len(_lines(folder / "content")) for folder in align.output.glob("artifacts/ppo-*.work"))


def _check_runs(process: subprocess.Popen[bytes], align: Align) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed\n{align.logs()}")


def _differing(straight: Align, killed: Align) -> float:
    mine, theirs = killed.weights(), straight.weights()
    return float(sum(mine.get(name) != theirs.get(name) for name in mine.keys() | theirs.keys()))


def _metrics(align: Align) -> list[dict[str, float]]:
    """What PPO logged, without what measures time."""
    return [
        {name: value for name, value in line.items() if not name.startswith(NOT_REPEATED)}
        for line in _lines(align.artifact("ppo"))
    ]


def _lines(folder: Path) -> list[dict[str, float]]:
    """What was logged in whole lines; a stage may be writing the next."""
    file = folder / "metrics.jsonl"
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in written.splitlines(keepends=True) if line.endswith("\n")]
