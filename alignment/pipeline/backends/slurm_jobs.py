"""Submits and follows a run as a chain of Slurm jobs, one for each stage, each of which is the ordinary driver."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from alignment.config.launch import SlurmBackend
from alignment.config.stage import StageConfig
from alignment.core.artifacts import read_manifest, write_json
from alignment.core.errors import PREEMPTED, AlignmentError, Busy, ConfigError, Preempted, StageError
from alignment.core.files import shipped, write_text
from alignment.pipeline.backends import slurm
from alignment.pipeline.backends.slurm import Job
from alignment.pipeline.execute import worker_protocol
from alignment.pipeline.execute.display import Display
from alignment.pipeline.plan.plan import Plan, PlannedStage
from alignment.stages.base import RunsOn
from alignment.stages.registry import kind_of

TEMPLATE = Path("slurm") / "stage.sbatch"
HERE = "launch.backend.submit=false"
"""The override that makes the driver inside a job run the stage itself."""

_DIRECTIVE = re.compile(r"[A-Za-z0-9._/@:=,+%-]+")
"""No newline, which would begin another directive, no space, no quote, nothing that a shell would interpret."""


def render(plan: Plan, stage: PlannedStage, *, folder: Path, wait: bool = False) -> str:
    """The job file of a stage. The job runs ``align run … --stage NAME`` in ``folder``, where the user called it; with
    ``wait`` it waits for another process that makes the same result. Raises ConfigError: a value is not allowed in a
    directive of Slurm, such as a folder with a space in its name."""
    slurm = plan.config.launch.backend
    assert isinstance(slurm, SlurmBackend), "no other backend submits jobs"
    directives = list(_directives(plan, stage, slurm))
    for directive in directives:
        if _DIRECTIVE.fullmatch(directive) is None:
            message = f"{directive!r} is not allowed in a job file"
            remedy = (
                "its names and folders may contain A-Z a-z 0-9 . _ / @ : = , + % -; output=FOLDER sets another folder"
            )
            raise ConfigError(message, where="launch.backend", remedy=remedy)
    machines = _num_machines(stage.config, slurm)
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    template = environment.from_string((shipped("launch") / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        directives=directives,
        folder=shlex.quote(str(folder)),
        machines=machines,
        step=shlex.join(_step(slurm, machines)),
        command=shlex.join(_command(plan, stage, wait=wait)),
    )


def _step(slurm: SlurmBackend, machines: int) -> list[str]:
    step = [f"--ntasks={machines}"]
    if machines == 1:
        step.append("--kill-on-bad-exit=1")
    else:  # a machine whose driver has ended leaves the others time to record and to save
        step += [f"--nodes={machines}", "--ntasks-per-node=1", "--kill-on-bad-exit=0", f"--wait={slurm.signal_seconds}"]
    if slurm.cpus is not None:
        step.append(f"--cpus-per-task={slurm.cpus}")  # srun does not inherit it from the job
    return step


def _command(plan: Plan, stage: PlannedStage, *, wait: bool) -> list[str]:
    """The user's command for one stage. ``-u``: a log shows each line when it is printed."""
    driver = [sys.executable, "-u", "-m", "alignment.cli", "run", plan.recipe, "--stage", stage.name]
    return [*driver, *(["--wait"] if wait else []), *plan.overrides, HERE]


def _directives(plan: Plan, stage: PlannedStage, slurm: SlurmBackend) -> Iterator[str]:
    yield f"--job-name={plan.config.name}.{stage.name}"
    yield f"--output={str(plan.run_folder / stage.name).replace('%', '%%')}/slurm-%j.log"
    yield "--open-mode=append"
    yield "--requeue"
    yield f"--signal=TERM@{slurm.signal_seconds}"
    machines = _num_machines(stage.config, slurm)
    yield f"--nodes={machines}"
    yield f"--ntasks={machines}"
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "gpus-per-node": _num_gpus(stage.config, slurm) or None,
        "cpus-per-task": slurm.cpus,
        "mem": slurm.memory,
    }
    for name, value in asked.items():
        if value is not None:
            yield f"--{name}={value}"


def _num_machines(config: StageConfig, slurm: SlurmBackend) -> int:
    return slurm.num_machines if kind_of(config).launch.runs_on.on_all else 1


def _num_gpus(config: StageConfig, slurm: SlurmBackend) -> int:
    runs_on = kind_of(config).launch.runs_on
    if runs_on is RunsOn.driver:
        return 0
    return min(slurm.gpus, 1) if runs_on is RunsOn.one_process else slurm.gpus


FILE = "jobs.json"
"""In the run's folder: stage → id of its job. Only the call that submits writes it; jobs write ``run.json``."""

_POLL_SECONDS = 5.0
_ASKED_TO_STOP = (PREEMPTED, 143)
"""Exit codes of a driver that was asked to stop; 143 if that was before it had begun (launch/slurm/stage.sbatch)."""
_ENDED_BY_SLURM = ("CANCELLED", "PREEMPTED")
_CONTINUES = "run the same command to continue; "
_FORGOTTEN = Job(state="COMPLETED", reason="Slurm has forgotten it")


def job_files(plan: Plan, stages: Sequence[PlannedStage], *, wait: bool = False) -> dict[str, str]:
    """Stage → the content of its job file, if the run is submitted from the current folder. Raises ConfigError: a value
    is not allowed in a job file."""
    folder = Path.cwd()
    return {stage.name: render(plan, stage, folder=folder, wait=wait) for stage in stages}


def submit(plan: Plan, stages: Sequence[PlannedStage], *, wait: bool) -> dict[str, str]:
    """Submits a job for each stage, in order, each to start when the one before has ended well; returns the ids. Raises
    ConfigError, Busy: Slurm refuses one or does not answer; those before it are cancelled, or named and remembered if
    that fails."""
    files = job_files(plan, stages, wait=wait)
    jobs: dict[str, str] = {}
    try:
        for name, text in files.items():
            file = plan.run_folder / name / TEMPLATE.name
            file.parent.mkdir(exist_ok=True)
            write_text(file, text)
            jobs[name] = slurm.submit(file, after=next(reversed(jobs.values()), None))
            write_json(plan.run_folder / FILE, jobs)
    except BaseException as error:
        if slurm.cancel(list(jobs.values())):
            (plan.run_folder / FILE).unlink(missing_ok=True)
        elif isinstance(error, AlignmentError):
            left = f"jobs {', '.join(jobs.values())} could not be cancelled and may still run; cancel them with scancel"
            error.remedy = f"{error.remedy}; {left}" if error.remedy else left
        raise
    return jobs


def read_jobs(run_folder: Path) -> dict[str, str]:
    """Stage → id of the job that was last submitted for it; empty if none was."""
    try:
        jobs = json.loads((run_folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {str(stage): str(job) for stage, job in jobs.items()}


def states(run_folder: Path) -> dict[str, str]:
    """Stage → its job in words, ``job 12 PENDING (Priority)``; only the id if Slurm does not answer."""
    jobs = read_jobs(run_folder)
    known = slurm.look(list(jobs.values())) or {}
    return {stage: f"job {job} {known.get(job, '')}".rstrip() for stage, job in jobs.items()}


def live(run_folder: Path) -> dict[str, str] | None:
    """Stage → id of its job, for the jobs of the run that wait or run; None if Slurm does not answer."""
    jobs = read_jobs(run_folder)
    known = slurm.look(list(jobs.values()))
    if known is None:
        return None
    return {stage: job for stage, job in jobs.items() if job in known and not known[job].ended}


def refuse_queued(run_folder: Path) -> None:
    """Refuses a run of which jobs wait or run; jobs that have ended are forgotten. Raises Busy: there are such jobs, or
    Slurm does not answer, so that there may be some."""
    jobs = read_jobs(run_folder)
    known = slurm.look(list(jobs.values()))
    if known is None:
        message = f"Slurm does not answer, so the jobs of this run may still wait or run: {_named(jobs)}"
        remedy = f"try again when squeue works here; if the jobs have ended, delete {run_folder / FILE}"
        raise Busy(message, where=str(run_folder), remedy=remedy)
    left = {stage: job for stage, job in jobs.items() if job in known and not known[job].ended}
    if left:
        message = f"Slurm has jobs of this run: {_named(left)}"
        raise Busy(message, where=str(run_folder), remedy=advice(run_folder, left))
    (run_folder / FILE).unlink(missing_ok=True)


def follow(plan: Plan, stages: Sequence[PlannedStage], jobs: Mapping[str, str], display: Display) -> None:
    """Shows each stage's job until it has ended; returns when all ended well. An interruption does not end the jobs.
    Raises AlignmentError: a job failed; the kind of error is that of the driver in it."""
    for stage in stages:
        job_id, running = jobs[stage.name], False
        for job in _polled(job_id):
            if running and job.state == "PENDING":
                again = f"job {job_id} was queued again; the stage continues from what it has stored"
                display.note(f"{stage.name}: {again}")
            running = job.state == "RUNNING" or (running and job.state != "PENDING")
            display.wait(stage.name, "" if running or job.ended else f"job {job_id} {job}")
            display.poll()
        _refuse_failed(plan, stage, job_id, job)
        display.poll()


def _polled(job_id: str) -> Iterator[Job]:
    """A job's state at intervals; the last one is how it ended. Waits as long as Slurm does not answer."""
    while True:
        known = slurm.look([job_id])
        if known is not None:
            job = known.get(job_id, _FORGOTTEN)
            yield job
            if job.ended:
                return
        time.sleep(_POLL_SECONDS)


def _refuse_failed(plan: Plan, stage: PlannedStage, job_id: str, job: Job) -> None:
    log = plan.run_folder / stage.name / f"slurm-{job_id}.log"
    if job.state != "COMPLETED":
        # Its exit code says so, or its state if it ended before it had a driver.
        was_stopped = job.exit_code in _ASKED_TO_STOP or (job.state in _ENDED_BY_SLURM and not job.exit_code)
        kind = Preempted if was_stopped else worker_protocol.ERRORS.get(job.exit_code, StageError)
        message = f"job {job_id} ended as {job} with exit code {job.exit_code}\n{worker_protocol.tail(log)}".rstrip()
        raise kind(message, where=f"stage {stage.name}", remedy=f"{_CONTINUES if was_stopped else ''}log: {log}")
    if not is_shown(stage.artifact):
        raise ConfigError(
            f"job {job_id} has ended, but its result {stage.artifact.name} is missing; "
            "did the recipe, its data or the code change in the meantime?",
            where=f"stage {stage.name}",
            remedy=f"run it again; log: {log}",
        )


def _named(jobs: Mapping[str, str]) -> str:
    return ", ".join(f"{stage} (job {job})" for stage, job in jobs.items())


def advice(run_folder: Path, jobs: Mapping[str, str]) -> str:
    """What a user can do about submitted jobs."""
    output = run_folder.parent.parent
    elsewhere = "" if output.resolve() == Path.cwd() else f" --output {output}"
    return f"`align status {run_folder.name}{elsewhere}` shows them, `scancel {' '.join(jobs.values())}` ends them"


_SHOWN_LATE_SECONDS = 60.0
"""Time within which a shared file system shows here what another machine has written."""
_LATE_POLL_SECONDS = 5.0


def is_shown(artifact: Path) -> bool:
    """Whether a result is there that another machine says it has made; waits for it for a while."""
    deadline = time.monotonic() + _SHOWN_LATE_SECONDS
    while read_manifest(artifact) is None:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LATE_POLL_SECONDS)
    return True
