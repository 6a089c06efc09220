"""Executes a plan: one stage after another, each in processes of its own, recorded as it goes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from alignment import __version__, launcher
from alignment.artifacts import Manifest, publish, read_manifest, verify
from alignment.config.launch import LaunchConfig
from alignment.config.stage import ReportConfig
from alignment.errors import PREEMPTED, ArtifactError, ConfigError
from alignment.launcher import Command
from alignment.locks import held
from alignment.pipeline import data_sources, handover, launching, machines, pulses, sources
from alignment.pipeline.display import Display, display_for, duration
from alignment.pipeline.handover import Preempted
from alignment.pipeline.plan import Action, Plan, PlannedStage, make_plan
from alignment.pipeline.record import RunRecord
from alignment.pipeline.signals import INTERRUPTED, Terminated, termination_raises
from alignment.pipeline.summary import REPORT, show_results

CommandFor = Callable[[LaunchConfig, Path], Command]
"""Makes the command that runs a stage file."""


def run(recipe: str, overrides: Sequence[str], *, console: Console, command_for: CommandFor | None = None) -> int:
    """Plans and executes; returns the exit code (alignment/errors.py).

    Raises:
        AlignmentError: a fault in the plan, or a stage that failed; what was done before stays and is reused.
    """
    command_for = command_for or command_here
    plan = make_plan(recipe, overrides)
    launch = launching.launch_of(plan)
    command_for(launch, plan.run_folder / "stage.yaml")  # refuses what this machine cannot start
    launching.refuse_uneven_batches(plan, launch)
    _make_writable(plan)
    display = display_for(console)
    if launch.machine_rank:
        plan = with_models(plan, display, stages=_not_reused(plan))
        return machines.follow(plan, launch, console=console, command_for=command_for)
    with held(plan.run_folder / "lock", wait=False):
        plan = with_models(plan, display, stages=_not_reused(plan))
        record = RunRecord(plan)
        try:
            with termination_raises():
                for stage in plan.stages:
                    _one_stage(plan, stage, record, display, command_for)
        except (KeyboardInterrupt, Terminated, Preempted) as stop:
            code = INTERRUPTED if isinstance(stop, KeyboardInterrupt) else PREEMPTED
            record.finish("interrupted" if code == INTERRUPTED else "preempted")
            console.print("stopped; the same command goes on from here", highlight=False)
            return code
        except BaseException:
            record.finish("failed")
            raise
        record.finish("done")
    show_results(console, plan.run_folder, record.content)
    return 0


def _make_writable(plan: Plan) -> None:
    """Makes the folders of the run.

    Raises:
        ConfigError: they cannot be made.
    """
    try:
        plan.run_folder.mkdir(parents=True, exist_ok=True)
        (plan.output / "artifacts").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=f"output={plan.output}", remedy="output=FOLDER names another"
        ) from error


def command_here(launch: LaunchConfig, stage_file: Path) -> Command:
    """The launcher's command for this machine."""
    return launcher.command(
        launch,
        stage_file,
        num_devices=launcher.count_devices(),
        num_cores=launcher.count_cores(),
        pythonpath=os.environ.get("PYTHONPATH", ""),
    )


def _not_reused(plan: Plan) -> list[PlannedStage]:
    return [s for s in plan.stages if s.action is not Action.reuse and not isinstance(s.config, ReportConfig)]


def with_models(plan: Plan, display: Display, *, stages: Sequence[PlannedStage]) -> Plan:
    """The plan with every model and all data on this machine that these stages need.

    Nothing is fetched for no stage. What had to be downloaded from a hub is pinned to a commit only then, and its rows
    were not checked yet, so the plan is made anew.
    """
    missing = [model for model in [plan.base, *plan.sources.values()] if not model.ready]
    data = {one.source: one for stage in stages for one in stage.hub_data if not one.complete}
    if not stages or not (missing or data):
        return plan
    for model in missing:
        sources.fetch(model, announce=display.note)
    for one in data.values():
        data_sources.fetch(one, announce=display.note)
    return make_plan(plan.recipe, plan.overrides)


def _one_stage(plan: Plan, stage: PlannedStage, record: RunRecord, display: Display, command_for: CommandFor) -> None:
    if stage.action is Action.reuse:
        _point_to_result(plan, stage)
        display.end(stage.name, "reused", stage.artifact.name)
        return
    for function in stage.code:
        display.note(f"{stage.name} runs your code: {function}")
    display.begin(stage.name, stage.reason)
    record.stage(stage.name, "running")
    started = time.monotonic()
    try:
        _make(plan, stage, display, command_for)
        verify(stage.artifact, content=False)
        _point_to_result(plan, stage)
    except BaseException as stop:
        interrupted = isinstance(stop, (KeyboardInterrupt, Terminated, Preempted))
        record.stage(stage.name, "waiting" if interrupted else "failed", seconds=time.monotonic() - started)
        display.end(stage.name, "failed" if not interrupted else "stopped", duration(time.monotonic() - started))
        raise
    record.stage(stage.name, "done", seconds=time.monotonic() - started)
    display.end(stage.name, "done", f"{duration(time.monotonic() - started):<12} {stage.artifact.name}")


def _make(plan: Plan, stage: PlannedStage, display: Display, command_for: CommandFor) -> None:
    """Makes the artifact, alone: another run that wants the same one is refused while this one works on it."""
    with held(stage.work / "lock", wait=False) as lock:
        if read_manifest(stage.artifact) is not None:
            return
        if isinstance(stage.config, ReportConfig):
            _make_report(plan, stage, stage.config)
        else:
            _launch(plan, stage, display, command_for, lock)
    shutil.rmtree(stage.work, ignore_errors=True)


def _launch(plan: Plan, stage: PlannedStage, display: Display, command_for: CommandFor, lock: int) -> None:
    commit = handover.commit_of_checkout(Path(__file__).resolve().parents[2])
    launch = launching.of_stage(launching.launch_of(plan), stage.config)
    stage_file = handover.write_stage_file(plan, stage, launch, git_commit=commit)
    folder = stage_file.parent
    (folder / "status.json").unlink(missing_ok=True)
    (stage.work / "progress.json").unlink(missing_ok=True)
    shutil.rmtree(stage.work / "pulse", ignore_errors=True)

    def on_poll() -> None:
        if (progress := handover.read_progress(stage.work)) is not None:
            display.update(progress)
        if launch.hang_seconds:
            pulses.refuse_stuck(
                pulses.read_signs(stage.work),
                processes=launch.world_size,
                limit=launch.hang_seconds,
                now=time.time(),
                stage=stage.name,
            )

    with machines.announced(folder, launch):
        code = launcher.execute(
            command_for(launch, stage_file),
            log=folder / "log.txt",
            on_poll=on_poll,
            grace_seconds=launch.grace_seconds,
            keep_open=[lock],
        )
    handover.raise_for_status(folder, code=code, stage=stage.name)
    manifest = read_manifest(stage.artifact)
    if manifest is None or manifest.fingerprint != stage.fingerprint:
        raise ArtifactError(
            "the stage said it was done, but its result is not there", where=str(stage.artifact), remedy="run it again"
        )


def _make_report(plan: Plan, stage: PlannedStage, config: ReportConfig) -> None:
    """Runs in this process: a report reads files and draws, it computes nothing."""
    from alignment import report

    started = time.monotonic()
    content = stage.work / "content"
    shutil.rmtree(content, ignore_errors=True)
    content.mkdir(parents=True)
    report.build(plan.run_folder, content / REPORT, num_samples=config.num_samples)
    manifest = Manifest(
        stage=stage.name,
        kind=config.produces,
        fingerprint=stage.fingerprint,
        identity=stage.identity,
        inputs=stage.input_fingerprints,
        usage={"seconds": round(time.monotonic() - started, 2)},
        versions={"alignment-pipeline": __version__},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    publish(content, stage.artifact, manifest)


def _point_to_result(plan: Plan, stage: PlannedStage) -> None:
    """A report also stands in the run's folder, where a user looks for it."""
    if isinstance(stage.config, ReportConfig):
        shutil.copyfile(stage.artifact / REPORT, plan.run_folder / REPORT)
