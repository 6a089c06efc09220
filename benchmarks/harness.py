"""One work from its rows to its results: contestants take turns, each measurement in a process of its own."""

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
from alignment.core.errors import ConfigError
from alignment.engines.engine_environment import VARIABLE, interpreter
from alignment.pipeline.backends import command, environment, processes
from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from alignment.pipeline.sources import bundled_model
from benchmarks import environments, rows
from benchmarks.journal import Journal
from benchmarks.machine import NO_AMX, ROOT, code_sha256, processor, scrubbed
from benchmarks.setting import MAX_LENGTH, ROWS, read_json
from benchmarks.stage import MODEL, artifact_of, stage_config, write_stage
from benchmarks.summary import summarise, table
from benchmarks.works import POINTS, WORKS, Contestant, Work

SCRATCH = Path(__file__).parent / ".measurements"
LIMIT_SECONDS = 3600
_GRACE_SECONDS = 10
_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Interrupt|Busy)\b: ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """``data`` is the folder of public data, None for the shipped rows; no ``contestants`` means all."""

    repetitions: int
    contestants: tuple[str, ...]
    data: Path | None
    threads: int
    amx: bool
    resume: bool
    results: Path


class Failed(Exception):
    """A process ended without a result; the message is its last line."""


def measure(name: str, options: Options) -> Path:
    """Measures a work and writes ``WORK.json`` and ``WORK.md``; returns the former's path.

    A run with fewer repetitions or contestants than it ought to have writes ``WORK-partial.*`` instead.

    Raises:
        OtherConditions: resumed under other conditions than it began.
        Failed: the rows could not be prepared, or the code was changed meanwhile.
    """
    work = WORKS[name]
    chosen = [one for one in work.contestants if not options.contestants or one in options.contestants]
    stem = _stem(name, options, whole=len(chosen) == len(work.contestants))
    base = bundled_model.ensure(bundled_model.lookup(MODEL.source.removeprefix("bundled:")), announce=print)
    conditions = _conditions(work, options, base)
    journal = Journal(SCRATCH / f"{stem}.jsonl", conditions, resume=options.resume)
    folder = SCRATCH / stem
    shutil.rmtree(folder, ignore_errors=True)
    inputs = _prepare(work, options, base, folder)
    pythons, missing = _interpreters(work, chosen)
    for repetition in range(options.repetitions):
        for contestant in chosen:
            if contestant in pythons and not journal.is_done(contestant, repetition):
                if code_sha256() != conditions["code_sha256"]:
                    raise Failed("the code was changed while it was measured; start anew")
                told = _Measurement(work, contestant, repetition, inputs, base, folder, pythons[contestant])
                _one(told, journal, options)
    content = summarise(name, inputs, _finished(journal, chosen, options), missing)
    shutil.rmtree(folder, ignore_errors=True)
    return _write(stem, content, conditions, inputs, options)


def _stem(name: str, options: Options, *, whole: bool) -> str:
    partial = not whole or options.repetitions < WORKS[name].repetitions
    return name + ("" if options.amx else "-no-amx") + ("-partial" if partial else "")


def _conditions(work: Work, options: Options, base: Path) -> dict[str, Any]:
    """What must not change between measurements that are compared."""
    kinds = {
        "sft": ("conversations",),
        "reward": ("pairs",),
        "dpo": ("pairs",),
        "kto": ("pairs",),
        "ppo": ("conversations", "pairs"),
    }
    return {
        "processor": processor(),
        "threads": options.threads,
        "amx": "as found" if options.amx else NO_AMX,
        "data": [rows.described(kind, options.data) for kind in kinds.get(work.kind, ("conversations",))],
        "base": {"source": MODEL.source, "folder": base.name},
        "code_sha256": code_sha256(),
    }


def _interpreters(work: Work, chosen: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each contestant, and why some have none."""
    pythons, missing = {}, {}
    for name in chosen:
        wanted, engine = work.contestants[name].environment, work.contestants[name].engine
        try:
            if engine is not None:  # which runs beside the contestant
                interpreter(None, package=engine, where=VARIABLE)
            pythons[name] = sys.executable if wanted is None else str(environments.python_of(wanted))
        except environments.CannotBuild as reason:
            missing[name] = f"its environment could not be built: {reason}"
        except ConfigError as reason:
            missing[name] = scrubbed(f"{reason.message}; {reason.remedy}")
        if name in missing:
            print(f"  {name}: {missing[name]}", flush=True)
    return pythons, missing


# ---- one process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Measurement:
    work: Work
    contestant: str
    repetition: int
    inputs: dict[str, Any]
    base: Path
    folder: Path
    python: str

    @property
    def how(self) -> Contestant:
        return self.work.contestants[self.contestant]


def _one(told: _Measurement, journal: Journal, options: Options) -> None:
    """Runs one measurement and notes it, or how it failed; failures of one contestant do not stop the others."""
    load, started = os.getloadavg(), time.monotonic()
    folder = told.folder / f"{told.contestant}-{told.repetition}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    content: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(value, 2) for value in load],
    }
    try:
        task = _task(told, folder)
        task_file = folder / "task.json"
        task_file.write_text(json.dumps(task), encoding="utf-8")
        with _neighbours(told.how.busy_neighbours):
            _run(_command(told, task, task_file, options), folder / "log.txt", amx=options.amx)
        content["result"] = read_json(Path(task["result"]))
        said = ", ".join(f"{value:.2f} s" for value in content["result"]["seconds"])
    except (Failed, FileNotFoundError, TimeoutError) as failure:
        content["error"] = said = scrubbed(str(failure))
        _keep_log(folder)
    journal.add(told.contestant, told.repetition, **content, process_seconds=round(time.monotonic() - started, 1))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  {told.repetition} {told.contestant:<18} {said}  (load {load[0]:.2f})", flush=True)


def _keep_log(folder: Path) -> None:
    """A failure's log stays for whoever has to mend it."""
    if (folder / "log.txt").exists():
        logs = SCRATCH / "logs"
        logs.mkdir(exist_ok=True)
        shutil.copyfile(folder / "log.txt", logs / f"{folder.parent.name}-{folder.name}.txt")


def _task(told: _Measurement, folder: Path) -> dict[str, Any]:
    """What a contestant is told; for ours also a stage file."""
    files = told.inputs["repetitions"][told.repetition]
    if told.work.kind == "growth":
        files = files[told.contestant]
    steps = 1 + told.how.measured
    task: dict[str, Any] = {
        "kind": told.work.kind,
        "adapter": told.work.adapter,
        "contestant": told.contestant,
        "steps": steps,
        "size": asdict(told.work.size),
        "base": str(told.base),
        "tokens": files["tokens"],
        "result": str(folder / "result.json"),
        **{key: told.inputs[key] for key in ("head", "reward_folder") if key in told.inputs},
    }
    if told.how.module == "ours":
        task |= {"stage_file": str(_stage_file(told, folder, Path(files["rows"]), steps))}
        task |= {"artifact": str(artifact_of(folder))}
    return task


def _stage_file(told: _Measurement, folder: Path, data: Path, steps: int) -> Path:
    kind, count, length, base = told.work.kind, ROWS, MAX_LENGTH, told.base
    if kind == "growth":
        point = POINTS[told.contestant]
        kind, count, length = "sft", point.rows, point.length
        base = told.base if point.model is None else told.folder / "models" / point.model
    config = stage_config(
        kind,
        told.work.adapter,
        data,
        steps=steps,
        rows=count,
        max_length=length,
        sharing=told.how.sharing,
        master_weights=told.how.master_weights,
        optim_changes=told.how.optim_changes,
    )
    reward = Path(told.inputs["reward_artifact"]) if "reward_artifact" in told.inputs else None
    return write_stage(folder, config, base=base, data=data, reward=reward)


def _command(told: _Measurement, task: dict[str, Any], task_file: Path, options: Options) -> command.Command:
    """Ours goes through the project's launcher, with the worker inside a module that measures; others share its
    environment, or have it without what it says about memory."""
    launched = command.of_stage(
        LaunchConfig(threads=options.threads),
        Path(task.get("stage_file", task_file)),
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
    )
    module = ["-m", f"benchmarks.contestants.{told.how.module}", str(task_file)]
    left_out = set() if told.how.our_memory else set(environment.CPU_MEMORY)
    left_out |= set() if told.how.threads_sleep else set(environment.WAITING_SETTINGS)
    variables = {name: value for name, value in launched.environment.items() if name not in left_out}
    if told.how.module != "ours":
        return command.Command(argv=(told.python, *module), environment=variables)
    assert launched.argv[-2] == "alignment.worker", "the launcher ends with the worker and its stage file"
    return command.Command(argv=(*launched.argv[:-3], *module), environment=variables)


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


def _run(measured: command.Command, log: Path, *, amx: bool) -> None:
    variables = measured.environment | ({} if amx else NO_AMX)
    deadline = time.monotonic() + LIMIT_SECONDS

    def on_poll() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it had not ended after {LIMIT_SECONDS} s")

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


def _prepare(work: Work, options: Options, base: Path, folder: Path) -> dict[str, Any]:
    """Rows of every repetition, in a process of its own so that this one stays small."""
    folder.mkdir(parents=True)
    task = {
        "kind": work.kind,
        "adapter": work.adapter,
        "base": str(base),
        "data": None if options.data is None else str(options.data),
        "size": asdict(work.size),
        "repetitions": options.repetitions,
        "folder": str(folder),
    }
    task_file = folder / "task.json"
    task_file.write_text(json.dumps(task), encoding="utf-8")
    variables = command.of_stage(
        LaunchConfig(threads=options.threads),
        task_file,
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
    ).environment
    argv = (sys.executable, "-m", "benchmarks.prepare", str(task_file))
    _run(command.Command(argv=argv, environment=variables), folder / "log.txt", amx=options.amx)
    inputs: dict[str, Any] = read_json(folder / "inputs.json")
    return inputs


# ---- results -----------------------------------------------------------------------------------------------------


def _finished(journal: Journal, chosen: list[str], options: Options) -> list[dict[str, Any]]:
    """What this run asked for, without the conditions, which the file says once."""
    return [
        {key: value for key, value in entry.items() if key != "conditions"}
        for entry in journal.entries
        if entry["contestant"] in chosen and entry["repetition"] < options.repetitions
    ]


def _write(
    stem: str, content: dict[str, Any], conditions: dict[str, Any], inputs: dict[str, Any], options: Options
) -> Path:
    results = [entry["result"] for entry in content["measurements"] if "result" in entry]
    told = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of_checkout(ROOT),
        "repetitions": options.repetitions,
        "conditions": conditions,
        "device": results[0]["device"] if results else "",
        "memory_is": results[0]["memory_kind"] if results else "",
        "versions": {
            entry["contestant"]: entry["result"]["versions"] for entry in content["measurements"] if "result" in entry
        },
        "rows": {key: inputs[key] for key in ("rows_that_fit", "rows_left_out", "rows_repeat") if key in inputs},
        "parameters": inputs["models"],
        **content,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{stem}.json"
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = f"# {stem}\n\n{_headline(told)}\n\n{table(content)}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text, flush=True)
    return path


def _headline(told: dict[str, Any]) -> str:
    machine = told["conditions"]["processor"]
    isa = ", ".join(flag for flag, there in machine["isa"].items() if there) or "no bf16 instructions"
    tiles = "" if told["conditions"]["amx"] == "as found" else "; oneDNN was told to leave AMX alone"
    loads = [entry["load_average"][0] for entry in told["measurements"]]
    load = f"{min(loads):.2f}–{max(loads):.2f}" if loads else "unknown"
    return (
        f"{told['date']}, {machine['model']}, {machine['cores']} cores ({isa}){tiles}, device {told['device']}, "
        f"{told['conditions']['threads']} threads, load average {load} before each measurement, median of "
        f"{told['repetitions']} repetitions."
    )
