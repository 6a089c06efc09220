"""One work from its rows to its table: contestants take turns, each measurement in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignment.config.launch import LaunchConfig
from alignment.core import hardware
from alignment.core.errors import ConfigError
from alignment.engines.engine_environment import VARIABLE, interpreter
from alignment.pipeline.backends import command
from alignment.pipeline.execute.worker_protocol import commit_of_checkout
from alignment.pipeline.sources import bundled_model
from benchmarks import environments, rows
from benchmarks.machine import NO_AMX, ROOT, code_sha256, compiler, processor, scrubbed, uncommitted_code
from benchmarks.measurement import SCRATCH, Circumstances, Failed, Measurement, run, taken
from benchmarks.searched import choices_of, search_file
from benchmarks.setting import read_json
from benchmarks.stage import MODEL
from benchmarks.summary import summarise, table
from benchmarks.work import Contestant, Work, with_choices
from benchmarks.works import WORKS


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """``data`` is the folder of public data, None for the shipped rows; no ``contestants`` means all."""

    repetitions: int
    contestants: tuple[str, ...]
    data: Path | None
    threads: int
    amx: bool
    results: Path

    @property
    def circumstances(self) -> Circumstances:
        """What every measurement has to know of these."""
        return Circumstances(threads=self.threads, amx=self.amx)


def measure(name: str, options: Options) -> Path:
    """Measures a work and writes ``WORK.json`` and ``WORK.md``; returns the former's path.

    A run with fewer repetitions or contestants than it ought to have, or in which a measurement failed, writes
    ``WORK-partial.*`` instead. A run that is stopped writes nothing.

    Raises:
        NoSearch: the settings of a rival were not searched here, so there is nothing to compare with.
        Failed: the rows could not be prepared, or the code is not committed or was changed meanwhile, or a contestant
            that was asked for has the setting of another one.
    """
    work = WORKS[name]
    base = base_model()
    conditions = conditions_of(work, options, base)
    if any(how.goal for how in chosen_of(work, options).values()):
        file = search_file(options.results, name, amx=options.amx)
        work = with_choices(work, choices_of(file, name, work, conditions, versions_of(work)))
        if merged := sorted(set(options.contestants) - set(work.contestants)):
            raise Failed(f"{', '.join(merged)}: the search chose the setting of another contestant; name that one")
    chosen = chosen_of(work, options)
    whole = len(chosen) == len(work.contestants) and options.repetitions >= work.repetitions
    if whole:
        refuse_uncommitted()
    folder = SCRATCH / stem_of(name, options, whole=whole)
    inputs = prepared(work, options, base, folder)
    pythons, missing = interpreters(chosen)
    entries = []
    for repetition in range(options.repetitions):
        for contestant in turns(list(pythons), repetition):
            refuse_other_code(conditions)
            measurement = Measurement(
                work=work,
                name=contestant,
                how=chosen[contestant],
                repetition=repetition,
                inputs=inputs,
                base=base,
                folder=folder,
                python=pythons[contestant],
            )
            entries.append(taken(measurement, options.circumstances))
    content = summarise(name, work, inputs, entries, missing)
    shutil.rmtree(folder, ignore_errors=True)
    whole = whole and not any("error" in entry for entry in entries)
    return _write(stem_of(name, options, whole=whole), content, conditions, inputs, options)


def turns(contestants: Sequence[str], repetition: int) -> list[str]:
    """Their order in a repetition. Each begins with another contestant, and every second one goes backwards, so that
    nobody is always first, or always behind the same one."""
    step = -1 if repetition % 2 else 1
    return [contestants[(repetition + step * turn) % len(contestants)] for turn in range(len(contestants))]


def base_model() -> Path:
    """The folder of the model that everyone trains."""
    return bundled_model.ensure(bundled_model.lookup(MODEL.source.removeprefix("bundled:")), announce=print)


def chosen_of(work: Work, options: Options) -> dict[str, Contestant]:
    """Those who take part."""
    return {
        name: how for name, how in work.contestants.items() if not options.contestants or name in options.contestants
    }


def stem_of(name: str, options: Options, *, whole: bool) -> str:
    """The name of the result's files, without their endings."""
    return name + ("" if options.amx else "-no-amx") + ("" if whole else "-partial")


def refuse_uncommitted() -> None:
    """Raises Failed if the code is not that of a commit, so that a published result could not be traced to it."""
    if changed := uncommitted_code():
        raise Failed(f"{len(changed)} files of the code are not committed ({changed[0]}); commit them first")


def conditions_of(work: Work, options: Options, base: Path) -> dict[str, Any]:
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
        "compiler": compiler() or "none",
        "launcher": _launcher_variables(options),
        "code_sha256": code_sha256(),
    }


def _launcher_variables(options: Options) -> dict[str, str]:
    """What the launcher sets for a contestant, but for paths."""
    variables = _launched(options, Path("stage.yaml")).environment
    return {name: value for name, value in sorted(variables.items()) if name != "PYTHONPATH"}


def _launched(options: Options, file: Path) -> command.Command:
    return command.of_stage(
        LaunchConfig(threads=options.threads),
        file,
        devices=hardware.visible_devices(),
        num_cores=hardware.count_cores(),
    )


def refuse_other_code(conditions: Mapping[str, Any]) -> None:
    """Raises Failed if the code is not that with which the run began."""
    if code_sha256() != conditions["code_sha256"]:
        raise Failed("the code was changed while it was measured; start anew")


def interpreters(chosen: dict[str, Contestant]) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each contestant, and why some have none."""
    pythons, missing = {}, {}
    for name, how in chosen.items():
        try:
            if how.engine is not None:  # which runs beside the contestant
                interpreter(None, package=how.engine, where=VARIABLE)
            pythons[name] = python_of(how)
        except environments.CannotBuild as reason:
            missing[name] = f"its environment could not be built: {reason}"
        except ConfigError as reason:
            missing[name] = scrubbed(f"{reason.message}; {reason.remedy}")
        if name in missing:
            print(f"  {name}: {missing[name]}", flush=True)
    return pythons, missing


def python_of(how: Contestant) -> str:
    """The interpreter of a contestant; its environment is built first where it is missing."""
    return sys.executable if how.environment is None else str(environments.python_of(how.environment))


def versions_of(work: Work) -> dict[str, dict[str, str]]:
    """The versions that each searched library has here. One whose environment cannot be built has none."""
    versions = {}
    for library, rival in work.rivals.items():
        try:
            versions[library] = environments.versions_in(python_of(rival.template))
        except environments.CannotBuild as reason:
            print(f"  {library}: its environment could not be built: {reason}", flush=True)
    return versions


def prepared(work: Work, options: Options, base: Path, folder: Path) -> dict[str, Any]:
    """Rows of every repetition, in a process of its own so that this one stays small."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    task = {
        "kind": work.kind,
        "adapter": work.adapter,
        "base": str(base),
        "data": None if options.data is None else str(options.data),
        "size": asdict(work.size),
        "batches": work.batches,
        "repetitions": options.repetitions,
        "folder": str(folder),
    }
    task_file = folder / "task.json"
    task_file.write_text(json.dumps(task), encoding="utf-8")
    variables = _launched(options, task_file).environment
    argv = (sys.executable, "-m", "benchmarks.prepare", str(task_file))
    run(command.Command(argv=argv, environment=variables), folder / "log.txt", amx=options.amx)
    inputs: dict[str, Any] = read_json(folder / "inputs.json")
    return inputs


# ---- results -----------------------------------------------------------------------------------------------------


def _write(
    stem: str, content: dict[str, Any], conditions: dict[str, Any], inputs: dict[str, Any], options: Options
) -> Path:
    results = [entry["result"] for entry in content["measurements"] if "result" in entry]
    complete = {
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
    path.write_text(json.dumps(complete, indent=1) + "\n", encoding="utf-8")
    text = f"# {stem}\n\n{_headline(complete)}\n\n{table(content)}"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print("\n" + text, flush=True)
    return path


def _headline(complete: dict[str, Any]) -> str:
    machine = complete["conditions"]["processor"]
    isa = ", ".join(flag for flag, there in machine["isa"].items() if there) or "no bf16 instructions"
    tiles = "" if complete["conditions"]["amx"] == "as found" else "; oneDNN was told to leave AMX alone"
    loads = [entry["load_average"][0] for entry in complete["measurements"]]
    load = f"{min(loads):.2f}–{max(loads):.2f}" if loads else "unknown"
    return (
        f"{complete['date']}, commit {complete['commit'][:7]}, {machine['model']}, {machine['cores']} cores "
        f"({isa}){tiles}, device {complete['device']}, {complete['conditions']['threads']} threads, load average "
        f"{load} before each measurement, median of {complete['repetitions']} repetitions."
    )
