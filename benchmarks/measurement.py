"""One measurement: a contestant on the rows of a repetition, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.config.launch import LaunchConfig
from alignment.core import hardware
from alignment.pipeline.backends import command, processes
from benchmarks.counts import padded_tokens
from benchmarks.grid import LAUNCHER_MEMORY, compiles
from benchmarks.growth import POINTS
from benchmarks.machine import NO_AMX, scrubbed
from benchmarks.setting import MAX_LENGTH, ROWS, read_json
from benchmarks.stage import artifact_of, stage_config, write_stage
from benchmarks.work import Contestant, Work

SCRATCH = Path(__file__).parent / ".measurements"
NO_COMPILING = "TORCHDYNAMO_DISABLE"
"""The launcher sets it on a CPU, because no stage compiles. ``torch.compile`` then does nothing, and says nothing."""
LIMIT_SECONDS = 3600
_GRACE_SECONDS = 10
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Busy)\b: ")


class Failed(Exception):
    """A process ended without a result; the message is its last line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Circumstances:
    """What is the same for all measurements of a run: ``threads``, and whether oneDNN may use ``amx``."""

    threads: int
    amx: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """``name`` is that of the contestant, and of the folder inside ``folder`` in which it runs.

    ``inputs`` are the prepared rows, ``python`` the contestant's interpreter. The first ``warm_up`` steps are not
    timed. A contestant that compiles and learns from rows takes a step on all rows before that, so that its code has
    been compiled for their shapes. A process that has not ended after ``limit_seconds`` has failed.
    """

    work: Work
    name: str
    how: Contestant
    repetition: int
    inputs: dict[str, Any]
    base: Path
    folder: Path
    python: str
    warm_up: int = 1
    limit_seconds: int = LIMIT_SECONDS

    @property
    def compiles(self) -> bool:
        """Whether the contestant compiles code."""
        library = self.how.library
        return library is not None and compiles(self.how.setting, self.work.rivals[library].axes)

    @property
    def steps_while_compiling(self) -> int:
        """Steps with which a contestant that compiles begins; the next takes the first rows again.

        None where answers are sampled: they have new lengths each time, and a policy that has learned for longer gives
        others.
        """
        learns_from_rows = self.work.quantity == "tokens_per_second" and self.work.kind != "sampling"
        return self.work.batches if self.compiles and learns_from_rows else 0

    @property
    def steps(self) -> int:
        """Steps after those: the warm-up and the measured ones."""
        return self.warm_up + self.how.measured

    @property
    def files(self) -> dict[str, Any]:
        """The rows of the repetition, as text and as tokens, and the counts of its steps."""
        files: dict[str, Any] = self.inputs["repetitions"][self.repetition]
        return files[self.name] if self.work.kind == "growth" else files


def taken(measurement: Measurement, circumstances: Circumstances) -> dict[str, Any]:
    """The measurement as an entry of a result file: its ``result``, or the ``error`` with which it ended."""
    load, started = os.getloadavg(), time.monotonic()
    folder = measurement.folder / f"{measurement.name}-{measurement.repetition}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entry: dict[str, Any] = {
        "contestant": measurement.name,
        "repetition": measurement.repetition,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(value, 2) for value in load],
    }
    try:
        task = task_of(measurement, folder)
        task_file = folder / "task.json"
        task_file.write_text(json.dumps(task), encoding="utf-8")
        with _neighbours(measurement.how.busy_neighbours):
            run(
                command_of(measurement, task, task_file, circumstances),
                folder / "log.txt",
                amx=circumstances.amx,
                limit_seconds=measurement.limit_seconds,
            )
        entry["result"] = _checked(read_json(Path(task["result"])), measurement)
        if padded := _padded(measurement):
            entry["padded_tokens"] = padded
        outcome = ", ".join(f"{value:.2f} s" for value in entry["result"]["seconds"])
    except (Failed, FileNotFoundError, TimeoutError) as failure:
        entry["error"] = outcome = scrubbed(str(failure))
        _keep_log(folder)
    entry["process_seconds"] = round(time.monotonic() - started, 1)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  {measurement.repetition} {measurement.name:<18} {outcome}  (load {load[0]:.2f})", flush=True)
    return entry


def _checked(result: dict[str, Any], measurement: Measurement) -> dict[str, Any]:
    """The result with the losses of the first ``steps`` steps, which are those that everybody takes.

    Raises:
        Failed: nothing was compiled although the setting says so.
    """
    if measurement.compiles and not result["compiled_graphs"]:
        raise Failed("torch.compile compiled nothing")
    return result | {"losses": result["losses"][: measurement.steps]}


def _padded(measurement: Measurement) -> list[int]:
    """``padded_tokens`` of each step of a rival that learns from rows; empty for all others."""
    if "micro_rows" not in measurement.how.setting or measurement.work.quantity != "tokens_per_second":
        return []
    rows = read_json(Path(measurement.files["tokens"]))
    steps = [rows[ROWS * step : ROWS * (step + 1)] for step in range(measurement.steps)]
    return [padded_tokens(measurement.work.kind, step, measurement.how.setting) for step in steps]


def _keep_log(folder: Path) -> None:
    """A failure's log stays for whoever has to mend it."""
    if (folder / "log.txt").exists():
        logs = SCRATCH / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "log.txt", logs / f"{folder.parent.name}-{folder.name}.txt")


# ---- what a contestant gets --------------------------------------------------------------------------------------


def task_of(measurement: Measurement, folder: Path) -> dict[str, Any]:
    """What a contestant reads; for ours also a stage file."""
    files = measurement.files
    task: dict[str, Any] = {
        "kind": measurement.work.kind,
        "adapter": measurement.work.adapter,
        "setting": dict(measurement.how.setting),
        "dtype": measurement.how.dtype,
        "warm_up": measurement.steps_while_compiling + measurement.warm_up,
        "steps": measurement.steps_while_compiling + measurement.steps,
        "size": asdict(measurement.work.size),
        "base": str(measurement.base),
        "tokens": files["tokens"],
        "result": str(folder / "result.json"),
        **{key: measurement.inputs[key] for key in ("head", "reward_folder") if key in measurement.inputs},
    }
    if measurement.how.module == "ours":
        task |= {"stage_file": str(_stage_file(measurement, folder, Path(files["rows"])))}
        task |= {"artifact": str(artifact_of(folder))}
    return task


def _stage_file(measurement: Measurement, folder: Path, data: Path) -> Path:
    kind, count, length, base = measurement.work.kind, ROWS, MAX_LENGTH, measurement.base
    if kind == "growth":
        point = POINTS[measurement.name]
        kind, count, length = "sft", point.rows, point.length
        base = measurement.base if point.model is None else measurement.folder / "models" / point.model
    config = stage_config(
        kind,
        measurement.work.adapter,
        data,
        steps=measurement.steps,
        rows=count,
        max_length=length,
        sharing=measurement.how.sharing,
        master_weights=measurement.how.master_weights,
        optim_changes=measurement.how.optim_changes,
    )
    reward = Path(measurement.inputs["reward_artifact"]) if "reward_artifact" in measurement.inputs else None
    return write_stage(folder, config, base=base, data=data, reward=reward)


def command_of(
    measurement: Measurement, task: dict[str, Any], task_file: Path, circumstances: Circumstances
) -> command.Command:
    """Ours goes through the project's launcher, with the worker inside a module that measures. Others share its
    environment, but may compile, and may lack its settings of memory and of waiting threads."""
    launched = command.of_stage(
        LaunchConfig(threads=circumstances.threads),
        Path(task.get("stage_file", task_file)),
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
    )
    module = ["-m", f"benchmarks.contestants.{measurement.how.module}", str(task_file)]
    left_out = {NO_COMPILING} if measurement.compiles else set()
    if not measurement.how.setting.get(LAUNCHER_MEMORY.name, True):
        left_out |= set(command.CPU_MEMORY)
    if not measurement.how.threads_sleep:
        left_out |= set(command.WAITING_SETTINGS)
    variables = {name: value for name, value in launched.environment.items() if name not in left_out}
    if measurement.how.module != "ours":
        return command.Command(argv=(measurement.python, *module), environment=variables)
    assert launched.argv[-2] == "alignment.worker", "the launcher ends with the worker and its stage file"
    return command.Command(argv=(*launched.argv[:-3], *module), environment=variables)


# ---- processes ---------------------------------------------------------------------------------------------------


@contextmanager
def _neighbours(number: int) -> Iterator[None]:
    """Processes that compute without pause, each on a core of its own if there is one."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(measured: command.Command, log: Path, *, amx: bool, limit_seconds: int = LIMIT_SECONDS) -> None:
    """Runs a process to its end.

    Raises:
        Failed: it ended with an error.
        TimeoutError: it was ended after ``limit_seconds``.
    """
    variables = measured.environment | ({} if amx else NO_AMX)
    deadline = time.monotonic() + limit_seconds

    def on_poll() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it had not ended after {limit_seconds} s")

    code = processes.execute(
        command.Command(argv=measured.argv, environment=variables),
        log=log,
        on_poll=on_poll,
        grace_seconds=_GRACE_SECONDS,
    )
    if code != 0:
        raise Failed(f"exit code {code}: {_reason(log)}")


def _reason(log: Path) -> str:
    """The last exception that a log names; a launcher's own, which only says that its worker failed, does not count."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _EXCEPTION.match(line) and "CalledProcessError" not in line]
    return (errors or lines or ["it said nothing"])[-1][:300]
