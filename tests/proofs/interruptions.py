"""A stage that is interrupted in eight ways, at six random moments each, ends with the bytes of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from alignment.core.locks import is_held
from alignment.training.checkpoints import MANIFEST as SEAL
from tests.e2e.conftest import environment
from tests.living import is_living
from tests.proofs.common import Claim
from tests.tiny import save_tiny_model

MOMENTS = 6
EPOCHS, STEPS = 20, 60
ONLY_SFT = tuple(f"~stages.{stage}" for stage in ("evaluate_sft", "reward", "dpo", "ppo", "evaluate", "report"))
SETTINGS = (
    "model.dtype=float32",
    "launch.threads=1",
    f"stages.sft.optim={{batch_size: 4, micro_batch_tokens: 512, epochs: {EPOCHS}, lr: 1e-3}}",
    "stages.sft.adapter.dropout=0.1",
    "stages.sft.save_every=4",
    *ONLY_SFT,
)
PATIENCE = 300.0
TRIES = 5
"""Attempts at a moment that is over in milliseconds."""
LEFT = ("*.tmp", "*.partial", "*.work", "quarantine-*", "reserve")
NOT_COMPARED = ("manifest.json", "metrics.jsonl")
"""Files that say when something was made and how long it took."""
FILE_LIMIT = 2000
"""Bytes: enough for the worker to say how it ended, too little for a checkpoint."""
Driver = subprocess.Popen[bytes]


@dataclass(kw_only=True)
class Stage:
    output: Path
    model: Path
    data: Path
    rng: random.Random
    hits: int = 0
    wrong: list[str] = field(default_factory=list)
    processes: list[psutil.Process] = field(default_factory=list)

    def start(self) -> Driver:
        """Calls ``align run``."""
        self.output.mkdir(exist_ok=True)
        own = (f"output={self.output}", f"model.source=path:{self.model}", f"stages.sft.data.source=path:{self.data}")
        argv = [sys.executable, "-m", "alignment.cli", "run", "quickstart", *own, *SETTINGS]
        with (self.output / "printed.txt").open("ab") as sink:
            return subprocess.Popen(argv, stdout=sink, stderr=sink, env=environment())

    def finish(self) -> None:
        code = self.start().wait(PATIENCE)
        if code != 0:
            raise RuntimeError(f"exit code {code} at the end\n{self.printed()[-3000:]}")

    @property
    def work(self) -> Path | None:
        return next(iter(self.output.glob("artifacts/sft-*.work")), None)

    @property
    def artifact(self) -> Path:
        (folder,) = self.output.glob("artifacts/sft-????????")
        return folder

    def printed(self) -> str:
        return (self.output / "printed.txt").read_text(encoding="utf-8")

    def steps(self) -> list[dict[str, Any]]:
        folder = self.work / "content" if self.work else self.artifact if self._is_done() else None
        if folder is None or not (folder / "metrics.jsonl").exists():
            return []
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    def _is_done(self) -> bool:
        return any(self.output.glob("artifacts/sft-????????/manifest.json"))

    def worker(self) -> psutil.Process | None:
        with suppress(OSError, ValueError, TypeError, psutil.Error):
            process = psutil.Process(json.loads((self.work / "heartbeats/0.json").read_text())["pid"])  # type: ignore[operator]
            return process if is_living(process) else None
        return None

    def files(self) -> dict[str, str]:
        if not self._is_done():
            return {}
        return {
            path.relative_to(self.artifact).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.artifact.rglob("*"))
            if path.is_file() and path.name not in NOT_COMPARED
        }

    def litter(self) -> list[str]:
        left = [path.name for pattern in LEFT for path in self.output.rglob(pattern)]
        return left + [path.name for path in self.output.rglob("lock") if is_held(path)]


# ---- moments --------------------------------------------------------------------------------------------------------


def _begins(stage: Stage) -> bool:
    return stage.worker() is not None


def _after(steps: int) -> Callable[[Stage], bool]:
    return lambda stage: len(stage.steps()) >= steps


def _saves(stage: Stage) -> bool:
    folders = stage.work.glob("checkpoints/checkpoint-*") if stage.work else ()
    return any(not (folder / SEAL).exists() for folder in folders)


def _ends(stage: Stage) -> bool:
    with suppress(OSError, ValueError, TypeError):
        progress = json.loads((stage.work / "progress.json").read_text())  # type: ignore[operator]
        return bool(progress["phase"] == "saving")
    return False


def _moments(rng: random.Random) -> list[tuple[Callable[[Stage], bool], float]]:
    steps = sorted(rng.sample(range(8, STEPS - 12), MOMENTS - 3))
    trained = [(_after(step), rng.uniform(0.0, 0.15)) for step in steps]
    return [(_begins, rng.uniform(0.0, 1.0)), *trained, (_saves, 0.0), (_ends, 0.0)]


def _wait_for(stage: Stage, driver: Driver, moment: Callable[[Stage], bool]) -> bool:
    begun = time.monotonic()
    while driver.poll() is None:
        if _begins(stage) and moment(stage):
            return True
        if time.monotonic() > begun + PATIENCE:
            raise TimeoutError(f"the moment never came\n{stage.printed()[-3000:]}")
        time.sleep(0.002)
    return False


# ---- kinds ----------------------------------------------------------------------------------------------------------


def _kill_all(_: Stage, driver: Driver, worker: psutil.Process) -> None:
    driver.kill()
    worker.kill()


def _kill_worker(_: Stage, __: Driver, worker: psutil.Process) -> None:
    worker.kill()


def _kill_driver(stage: Stage, driver: Driver, worker: psutil.Process) -> None:
    driver.kill()
    driver.wait(PATIENCE)
    code = stage.start().wait(PATIENCE)
    if is_living(worker) and (code != 8 or f"in use by process {worker.pid} " not in stage.printed()):
        stage.wrong.append(f"exit code {code} beside an orphan")
    with suppress(psutil.Error):
        worker.kill()
        worker.wait(PATIENCE)


def _to_driver(*numbers: signal.Signals) -> Callable[[Stage, Driver, psutil.Process], None]:
    return lambda _, driver, __: [driver.send_signal(number) for number in numbers] and None


def _to_worker(_: Stage, __: Driver, worker: psutil.Process) -> None:
    worker.send_signal(signal.SIGUSR1)


def _no_room(_: Stage, __: Driver, worker: psutil.Process) -> None:
    _, hard = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))


@dataclass(frozen=True, kw_only=True)
class Kind:
    strike: Callable[[Stage, Driver, psutil.Process], None]
    codes: frozenset[int]


KINDS = {
    "SIGKILL to all": Kind(strike=_kill_all, codes=frozenset({-9})),
    "SIGKILL to the worker": Kind(strike=_kill_worker, codes=frozenset({5})),
    "SIGKILL to the driver": Kind(strike=_kill_driver, codes=frozenset({-9})),
    "SIGTERM": Kind(strike=_to_driver(signal.SIGTERM), codes=frozenset({75})),
    "Ctrl-C": Kind(strike=_to_driver(signal.SIGINT), codes=frozenset({130})),
    "terminal closed": Kind(strike=_to_driver(signal.SIGHUP, signal.SIGHUP), codes=frozenset({75})),
    "SIGUSR1 to the worker": Kind(strike=_to_worker, codes=frozenset({75})),
    "no room for files": Kind(strike=_no_room, codes=frozenset({12})),
}


def _interrupted(stage: Stage, kind: Kind) -> None:
    for moment, later in _moments(stage.rng):
        for _ in range(TRIES):
            if _hit(stage, kind, moment, later):
                stage.hits += 1
                break
            shutil.rmtree(stage.artifact)  # it was done before the moment was seen
    stage.finish()


def _hit(stage: Stage, kind: Kind, moment: Callable[[Stage], bool], later: float) -> bool:
    driver = stage.start()
    hit = False
    if _wait_for(stage, driver, moment):
        time.sleep(later)
        worker = stage.worker()
        if worker is not None and driver.poll() is None:
            stage.processes.append(worker)
            with suppress(psutil.Error, ProcessLookupError):
                kind.strike(stage, driver, worker)
                hit = True
    code = driver.wait(PATIENCE)
    if code not in kind.codes | {0}:
        stage.wrong.append(f"exit code {code}\n{stage.printed()[-2000:]}")
    return hit


def run(folder: Path) -> list[Claim]:
    """An undisturbed stage, and eight that are interrupted."""
    given = {"model": save_tiny_model(folder / "tiny"), "data": _data(folder / "conversations.jsonl")}
    straight = Stage(output=folder / "straight", rng=random.Random(0), **given)
    straight.finish()
    stages: dict[str, Stage] = {}
    for number, (name, kind) in enumerate(KINDS.items(), start=1):
        stages[name] = Stage(output=folder / f"kind-{number}", rng=random.Random(number), **given)
        _interrupted(stages[name], kind)
    return _claims(straight, list(stages.values()))


def _data(file: Path) -> Path:
    rows = [
        [{"role": "user", "content": f"How much is {n}?"}, {"role": "assistant", "content": f"It is {n}, no more."}]
        for n in range(12)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return file


def _claims(straight: Stage, stages: list[Stage]) -> list[Claim]:
    expected, logged = straight.files(), straight.steps()
    for problem in [problem for stage in stages for problem in stage.wrong]:
        print(problem, file=sys.stderr)
    alive = [process for stage in stages for process in stage.processes if process.is_running()]
    return [
        Claim(figure="kinds of interruption", values=(float(len(stages)),), at_least=8),
        Claim(
            figure="interruptions of a stage at work, of six, by kind",
            values=tuple(float(stage.hits) for stage in stages),
            at_least=MOMENTS,
        ),
        Claim(
            figure="calls that ended with another exit code than documented",
            values=(float(sum(len(stage.wrong) for stage in stages)),),
            at_most=0,
        ),
        Claim(figure="files of a result", values=(float(len(expected)),), at_least=5),
        Claim(
            figure="files that are missing or differ by a byte",
            values=tuple(float(_differing(expected, stage.files())) for stage in stages),
            at_most=0,
        ),
        Claim(figure="steps logged, each once", values=(float(len(logged)),), at_least=STEPS),
        Claim(
            figure="logs with other steps or figures, or one twice",
            values=(float(sum(stage.steps() != logged for stage in stages)),),
            at_most=0,
        ),
        Claim(
            figure="temporary files, work folders and locks left",
            values=tuple(float(len(stage.litter())) for stage in (straight, *stages)),
            at_most=0,
        ),
        Claim(figure="processes left", values=(float(len(alive)),), at_most=0),
    ]


def _differing(expected: dict[str, str], actual: dict[str, str]) -> int:
    return sum(expected.get(name) != actual.get(name) for name in expected.keys() | actual.keys())
