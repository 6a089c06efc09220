"""``align run`` killed ten times at random moments of its PPO stage ends with the weights of an undisturbed run."""

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
    started = time.monotonic()
    straight("run", *PPO)
    # An attempt gets as far as a tenth of the way at most, so ten of them cannot reach the end.
    longest = (time.monotonic() - started) / KILLS
    rng = random.Random(0)
    reached = [_killed_after(killed, rng.uniform(0.0, longest)) for _ in range(KILLS)]
    killed("run", *PPO)
    expected = [STEPS_PER_UPDATE * (update + 1) for update in range(UPDATES)]
    found = [line["step"] for line in _metrics(killed)]
    return [
        Claim(figure="kills while the stage was at work", values=(float(len(reached)),), at_least=KILLS),
        Claim(figure="of these, with new updates since the kill before", values=(_advanced(reached),), at_least=4),
        Claim(figure="files of weights", values=(float(len(killed.weights())),), at_least=3),
        Claim(figure="files of weights that differ", values=(_differing(straight, killed),), at_most=0),
        Claim(figure="updates logged other than once", values=(float(found != expected),), at_most=0),
        Claim(
            figure="updates whose figures differ",
            values=(float(sum(a != b for a, b in zip(_metrics(straight), _metrics(killed), strict=True))),),
            at_most=0,
        ),
    ]


def _killed_after(align: Align, seconds: float) -> int:
    """SIGKILL to the driver and all its processes, so long after the stage began to work; returns its updates."""
    begun = time.time()
    process = subprocess.Popen(
        align.argv("run", *PPO), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    while not any(file.stat().st_mtime > begun for file in align.output.glob("artifacts/ppo-*.work/progress.json")):
        _check_runs(process, align)
        if time.time() > begun + PATIENCE:
            raise TimeoutError(f"the stage did not begin in {PATIENCE:.0f} s\n{align.logs()}")
        time.sleep(0.01)
    time.sleep(seconds)
    _check_runs(process, align)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        os.kill(one.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everyone, timeout=30)
    (work,) = align.output.glob("artifacts/ppo-*.work")
    return len(list(_lines(work / "content/metrics.jsonl")))


def _check_runs(process: subprocess.Popen[bytes], align: Align) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the run ended before it could be killed\n{align.logs()}")


def _advanced(reached: list[int]) -> float:
    """How many attempts got further than all before them."""
    return float(sum(now > max([0, *reached[:number]]) for number, now in enumerate(reached)))


def _differing(straight: Align, killed: Align) -> float:
    mine, theirs = killed.weights(), straight.weights()
    return float(sum(mine.get(name) != theirs.get(name) for name in mine.keys() | theirs.keys()))


def _metrics(align: Align) -> list[dict[str, float]]:
    """What PPO logged, without what measures time."""
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(NOT_REPEATED)}
        for line in _lines(align.artifact("ppo") / "metrics.jsonl")
    ]


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
