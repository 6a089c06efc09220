"""Executes a plan: one stage after another, each in its own processes, and records the progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from typing import Protocol, cast

from rich.console import Console

from alignment import __version__
from alignment.core import hardware
from alignment.core.artifacts import Manifest, publish, read_manifest, verify
from alignment.core.errors import PREEMPTED, ArtifactError, Busy, ConfigError, Preempted
from alignment.core.files import CODE_ROOT, disk_error, remove_leftovers, replacing
from alignment.core.locks import held, is_held
from alignment.core.terminal import begin_attempt, say
from alignment.pipeline.backends import command, feasibility, machines, processes, slurm, slurm_jobs
from alignment.pipeline.backends.command import CommandFor
from alignment.pipeline.backends.slurm_jobs import HERE
from alignment.pipeline.execute import (
    estimates,
    exchange,
    gates,
    notes,
    rehearsal,
    run_state,
    worker_protocol,
)
from alignment.pipeline.execute.display import Announce, Display, announcer, refused_in_vain, showing, with_its_words
from alignment.pipeline.execute.record import RunRecorder, recorded_seconds
from alignment.pipeline.execute.run_view import RunReader
from alignment.pipeline.execute.signals import INTERRUPTED, Terminated, acknowledgement, termination_raises
from alignment.pipeline.execute.stored_results import not_reused, with_inputs, with_models
from alignment.pipeline.execute.summary import REPORT, show_doubts, show_results, verdicts
from alignment.pipeline.execute.workers import Watch, Workers, refuse_stuck, workers_of
from alignment.pipeline.plan import references
from alignment.pipeline.plan.actions import Action
from alignment.pipeline.plan.plan import Plan, PlannedStage, make_plan
from alignment.records.run import RunRecord
from alignment.records.worker import HEARTBEATS, PROGRESS, STATUS
from alignment.report import doubts
from alignment.stages.registry import kind_of


def run(
    recipe: str,
    overrides: Sequence[str],
    *,
    console: Console,
    only: str | None = None,
    wait: bool = False,
    verified: bool = False,
    command_for: CommandFor | None = None,
) -> int:
    """Plans a recipe and runs the plan, after advice on the recipe; returns the exit code (alignment/core/errors.py).
    Results that are reused are compared with their hashes if ``verified``, otherwise with their sizes."""
    plan = make_plan(recipe, overrides, verified=verified)
    return run_with_advice(plan, console=console, only=only, wait=wait, command_for=command_for)


def run_with_advice(
    plan: Plan,
    *,
    console: Console,
    only: str | None = None,
    wait: bool = False,
    command_for: CommandFor | None = None,
) -> int:
    """``run_plan``, after advice on the recipe; a stage that runs alone needs none."""
    for note in notes.advice(plan) if only is None else ():
        announcer(console)(f"note: {note}")
    return run_plan(plan, console=console, only=only, wait=wait, command_for=command_for)


def run_trial(recipe: str, overrides: Sequence[str], *, console: Console, wait: bool) -> int:
    """``run`` for a trial of a sweep: without advice on the recipe, which every trial would repeat."""
    return run_plan(make_plan(recipe, overrides), console=console, wait=wait)


def run_plan(
    plan: Plan,
    *,
    console: Console,
    only: str | None = None,
    wait: bool = False,
    command_for: CommandFor | None = None,
) -> int:
    """Executes all stages, or the one named ``only``; returns the exit code (alignment/core/errors.py). If another
    process works on this run or on a result that it needs, the call is refused; with ``wait`` it waits for that process
    and reuses its results. Raises AlignmentError: a stage that cannot run or failed; finished results stay and are
    reused. GateNotMet: all stages are done, but the results do not meet a gate."""
    if only is not None:
        plan = with_inputs(plan, only, announcer(console))
    for note in notes.of_plan(plan):
        announcer(console)(f"note: {note}")
    launch = plan.config.launch
    _refuse_what_cannot_start(plan, only)
    if plan.store is not None:
        plan.store.check_writable()
    if slurm.submission(launch) is not None:
        slurm.refuse_without_slurm()
        _make_writable(plan)
        return _submit(plan, only, console, wait=wait)
    _make_writable(plan)
    if only is None or HERE not in plan.overrides:  # a job makes one stage while others of its chain wait
        slurm_jobs.refuse_queued(plan.run_folder)
    if launch.backend.machine_rank:
        plan = _with_all(plan, announcer(console), only, wait=True)  # for the first machine, which calls it too
        return machines.follow(plan, _chosen(plan, only), console=console, command_for=command_for or command.here)
    return _execute(plan, only, console, command_for, wait=wait)


def _execute(plan: Plan, only: str | None, console: Console, command_for: CommandFor | None, *, wait: bool) -> int:
    with ExitStack() as stack:
        if wait and is_held(plan.run_folder / "lock"):
            announcer(console)("another process is working on this run; waiting")
        stack.enter_context(held(plan.run_folder / "lock", wait=wait, remedy=exchange.WAIT))
        remove_leftovers(plan.run_folder, shared=True)  # a call that submits jobs writes jobs.json there
        machines.forget_attempts(plan)
        stack.enter_context(machines.showing_life(plan.run_folder, plan.config.launch))
        exchange.set_damaged_aside(plan, announcer(console), stages=_needed(plan, only), wait=wait)
        plan = _with_all(plan, announcer(console), only, wait=wait)
        recorder = RunRecorder(plan, only=only)
        with showing(console, RunReader(plan.run_folder)) as display:
            code = _run_stages(plan, only, recorder, display, command_for, wait=wait)
            is_done = not code and _end(plan, recorder)
            display.poll()
        if code:
            console.print("stopped; run the same command to continue from here", highlight=False)
            return code
        if is_done:
            show_results(console, plan.run_folder, recorder.record)
    if HERE not in plan.overrides:  # in a job, the chain goes on; the call that waits for its end reports this
        _judge(plan, only, console)
    return 0


def _end(plan: Plan, recorder: RunRecorder) -> bool:
    is_done = recorder.end()
    if is_done and gates.not_met(plan.stages):
        recorder.finish(gates.NOT_MET)
    return is_done


def _run_stages(
    plan: Plan,
    only: str | None,
    recorder: RunRecorder,
    display: Display,
    command_for: CommandFor | None,
    *,
    wait: bool,
) -> int:
    with termination_raises():
        try:
            with workers_of(plan, not_reused(_chosen(plan, only)), command_for) as workers:
                display.poll()
                if command_for is None:  # only if this machine's own workers run the stages
                    rehearsal.rehearse(plan, _chosen(plan, only), workers.server, announce=display.note)
                for stage in _chosen(plan, only):
                    _one_stage(plan, stage, recorder, display, workers, wait=wait)
        except (KeyboardInterrupt, Terminated, Preempted) as stop:
            code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED
            with suppress(OSError):  # a full disk does not change why the run ended
                recorder.finish("interrupted" if code == INTERRUPTED else "preempted")
            return code
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, Busy):
                    recorder.end()  # another process makes the stage, so the run has not failed
                else:
                    recorder.finish("failed")
            display.poll()
            raise
        return 0


def _submit(plan: Plan, only: str | None, console: Console, *, wait: bool) -> int:
    with showing(console, RunReader(plan.run_folder)) as display:
        with held(plan.run_folder / "submit.lock", wait=False):
            slurm_jobs.refuse_queued(plan.run_folder)
            with held(plan.run_folder / "lock", wait=False):  # released before the first job needs it
                exchange.set_damaged_aside(plan, display.note, stages=_needed(plan, only), wait=wait)
                plan = _with_all(plan, display.note, only, wait=wait)
                _end(plan, RunRecorder(plan, only=only))
            display.poll()
            waiting = []
            for stage in _chosen(plan, only):
                if stage.action is Action.reuse:
                    _reuse(plan, stage, display.note)
                else:
                    waiting.append(stage)
            submitted = slurm_jobs.submit(plan, waiting, wait=wait)
        for name, job in submitted.items():
            display.note(f"{name}: job {job}")
        submission = slurm.submission(plan.config.launch)
        if submitted and submission is not None and not submission.wait:
            display.note(slurm_jobs.advice(plan.run_folder, submitted))
            return 0
        try:
            slurm_jobs.follow(plan, waiting, submitted, display)
        except KeyboardInterrupt:
            display.note(f"the jobs continue: {slurm_jobs.advice(plan.run_folder, submitted)}")
            return INTERRUPTED
    record = RunRecord.read(plan.run_folder)
    show_results(console, plan.run_folder, record)
    show_doubts(console, plan.run_folder, record)  # jobs have printed them to their own logs
    _judge(plan, only, console)
    return 0


def _judge(plan: Plan, only: str | None, console: Console) -> None:
    stages = _chosen(plan, only)
    say(console, *gates.met(stages))
    gates.refuse(stages, plan.config.stages)


def _refuse_what_cannot_start(plan: Plan, only: str | None) -> None:
    launch = plan.config.launch
    feasibility.refuse_what_cannot_start(launch, _chosen(plan, only), num_devices=feasibility.devices_for(launch))


def _with_all(plan: Plan, announce: Announce, only: str | None, *, wait: bool) -> Plan:
    plan_with_results = exchange.with_results(plan, announce, stages=_needed(plan, only), wait=wait)
    complete = with_models(plan_with_results, announce, stages=not_reused(_chosen(plan_with_results, only)))
    if complete is not plan:
        _refuse_what_cannot_start(complete, only)
    return complete


def _make_writable(plan: Plan) -> None:
    try:
        plan.run_folder.mkdir(parents=True, exist_ok=True)
        (plan.output / "artifacts").mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder=plan.output) or ConfigError(
            f"cannot be written: {error.strerror}", where=f"output={plan.output}", remedy="output=FOLDER sets another"
        ) from error


def _chosen(plan: Plan, only: str | None) -> list[PlannedStage]:
    return [stage for stage in plan.stages if only in (None, stage.name)]


def _needed(plan: Plan, only: str | None) -> list[PlannedStage]:
    inputs = [] if only is None else references.inputs_of(only, plan.config.stages)
    return [stage for stage in plan.stages if only in (None, stage.name) or stage.name in inputs]


def _one_stage(
    plan: Plan, stage: PlannedStage, recorder: RunRecorder, display: Display, workers: Workers, *, wait: bool
) -> None:
    if stage.action is Action.reuse:
        if recorder.record.stages[stage.name].state != "reused":  # it was made by an earlier call for the same stage
            display.note(f"{stage.name}: reused  {stage.artifact.name}")
        _reuse(plan, stage, display.note)
        _doubt(plan, stage, display.note)
        return
    for function in stage.user_code:
        display.note(f"{stage.name} runs your code: {function}")
    recorder.stage(stage.name, "running")
    try:
        was_made = _make(plan, stage, recorder, display, workers, wait=wait)
        verify(stage.artifact, content=False)
        _point_to_result(plan, stage)
    except BaseException as stop:
        # Busy: another run makes the stage, or a process of an earlier call of this one, whose driver was killed.
        interrupted = isinstance(stop, (KeyboardInterrupt, Terminated, Preempted, Busy))
        took = None if isinstance(stop, Busy) else recorder.attempt_seconds(stage.name)
        with suppress(OSError):
            recorder.stage(stage.name, "waiting" if interrupted else "failed", seconds=took)
        raise
    if was_made:
        recorder.stage(stage.name, "done", seconds=recorder.attempt_seconds(stage.name))
    else:
        recorder.stage(stage.name, "reused", seconds=recorded_seconds(stage))
    display.poll()
    if any(not kind_of(later.config).in_driver for later in plan.stages[plan.stages.index(stage) + 1 :]):
        for line in verdicts(stage.config.kind, stage.artifact):  # those of the last stage follow at the run's end
            display.note(f"{stage.name}: {line}")
    _doubt(plan, stage, display.note)


def _reuse(plan: Plan, stage: PlannedStage, announce: Announce) -> None:
    if stage.work.exists() and read_manifest(stage.artifact) is not None:
        with suppress(Busy), held(stage.work / "lock", wait=False):
            if not is_held(stage.work / "worker.lock"):  # its process was killed right after it was done
                shutil.rmtree(stage.work, ignore_errors=True)
    exchange.upload(plan, stage, announce)
    _point_to_result(plan, stage)


def _doubt(plan: Plan, stage: PlannedStage, announce: Announce) -> None:
    if not doubts.is_smoke(plan.profile):
        for doubt in notes.of_result(stage.config.kind, stage.artifact):
            announce(f"{stage.name}: {doubt}")


def _make(
    plan: Plan, stage: PlannedStage, recorder: RunRecorder, display: Display, workers: Workers, *, wait: bool
) -> bool:
    """Makes the artifact under a lock: meanwhile, another run that needs it is refused or waits. Returns False if
    another process has made it in the meantime."""
    if wait and is_held(stage.work / "lock"):
        display.wait(stage.name, "another process is working on it; waiting")
        display.poll()
    with held(stage.work / "lock", wait=wait, remedy=exchange.WAIT) as lock:
        display.wait(stage.name, "")
        if read_manifest(stage.artifact) is not None:
            shutil.rmtree(stage.work, ignore_errors=True)
            return False
        # In a job of Slurm, which queues it again, attempts that store nothing come to an end.
        bounded = refused_in_vain(stage.work, stage.name) if HERE in plan.overrides else nullcontext()
        with exchange.of_stage(plan, stage, display.note, wait=wait) as is_missing:
            if is_missing:
                with bounded, run_state.counted(stage.work) as attempt:
                    recorder.attempt(stage.name, attempt)
                    if kind_of(stage.config).in_driver:
                        _make_report(plan, stage, cast(ReportSettings, stage.config))
                    else:
                        _launch(plan, stage, display, workers, lock, attempt=attempt.number)
    shutil.rmtree(stage.work, ignore_errors=True)
    return is_missing


def _launch(plan: Plan, stage: PlannedStage, display: Display, workers: Workers, lock: int, *, attempt: int) -> None:
    commit = worker_protocol.commit_of_checkout(CODE_ROOT)
    launch = feasibility.of_stage(plan.config.launch, stage.config, num_devices=hardware.count_devices())
    stage_file = worker_protocol.write_stage_file(plan, stage, launch, git_commit=commit)
    folder = stage_file.parent
    estimates.pass_on(plan, stage, folder)
    for written in (folder, stage.work):
        remove_leftovers(written)
    (folder / STATUS).unlink(missing_ok=True)
    (stage.work / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(stage.work / HEARTBEATS, ignore_errors=True)
    watch = Watch(stage.work)
    display.poll()

    def on_poll() -> None:
        display.poll()
        if launch.hang_seconds:
            refuse_stuck(
                watch.look(),
                processes=launch.world_size,
                limit=launch.hang_seconds,
                stage=stage.name,
            )

    log = folder / "log.txt"
    begin_attempt(log, f"attempt {attempt} at {stage.artifact.name}")
    with with_its_words(folder, lambda text: display.note(f"{stage.name}: {text}")):
        with machines.announced(folder, launch, stage.fingerprint):
            code = processes.execute(
                workers.command_for(launch, stage_file),
                log=log,
                on_poll=on_poll,
                on_stop=lambda stop: display.note(acknowledgement(stop)),
                grace_seconds=launch.grace_seconds,
                keep_open=[lock],
                server=workers.server,
            )
        for note in worker_protocol.notes(folder):
            display.note(f"{stage.name}: {note}")
        worker_protocol.raise_for_status(
            folder, code=code, stage=stage.name, kinds=[stage.config.kind], work=stage.work
        )
    manifest = read_manifest(stage.artifact)
    if manifest is None or manifest.fingerprint != stage.fingerprint:
        message = "the stage reported success, but its result is missing"
        raise ArtifactError(message, where=str(stage.artifact), remedy="run it again")


class ReportSettings(Protocol):
    """The settings of a stage that makes a page about its run."""

    kind: str
    num_samples: int


def _make_report(plan: Plan, stage: PlannedStage, config: ReportSettings) -> None:
    """Runs in this process, because a report only reads files and draws."""
    from alignment.report.run_page.render import build

    started = time.monotonic()
    content = stage.work / "content"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    build(plan.run_folder, content / REPORT, num_samples=config.num_samples)
    manifest = Manifest(
        stage=stage.name,
        kind=kind_of(config).produces,
        fingerprint=stage.fingerprint,
        identity=stage.identity,
        inputs=stage.input_fingerprints,
        usage={"seconds": round(time.monotonic() - started, 2)},
        versions={"alignment-pipeline": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    publish(content, stage.artifact, manifest)


def _point_to_result(plan: Plan, stage: PlannedStage) -> None:
    if kind_of(stage.config).in_driver:
        with replacing(plan.run_folder / REPORT) as temporary:
            shutil.copyfile(stage.artifact / REPORT, temporary)
