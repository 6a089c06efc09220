"""A stage as a job file for ``sbatch``: a pure function of the plan and the template in ``launch/slurm``."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from alignment.config.launch import SlurmBackend
from alignment.config.stage import StageConfig
from alignment.core.errors import ConfigError
from alignment.core.files import shipped
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
    ``wait`` it waits for another process that makes the same result.

    Raises:
        ConfigError: a value is not allowed in a directive of Slurm, such as a folder with a space in its name.
    """
    slurm = plan.config.launch.backend
    assert isinstance(slurm, SlurmBackend), "no other backend submits jobs"
    directives = [_checked(directive) for directive in _directives(plan, stage, slurm)]
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
    """How ``srun`` starts the command once on each machine."""
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
    yield f"--output={_literal(plan.run_folder / stage.name)}/slurm-%j.log"
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
    """A stage that does not run on all processes needs one machine."""
    return slurm.num_machines if kind_of(config).launch.runs_on.on_all else 1


def _num_gpus(config: StageConfig, slurm: SlurmBackend) -> int:
    """A stage that the driver makes needs no GPU, and one with a single process needs at most one."""
    runs_on = kind_of(config).launch.runs_on
    if runs_on is RunsOn.driver:
        return 0
    return min(slurm.gpus, 1) if runs_on is RunsOn.one_process else slurm.gpus


def _literal(path: Path) -> str:
    """The path, escaped for Slurm, which replaces what follows a % sign."""
    return str(path).replace("%", "%%")


def _checked(directive: str) -> str:
    if _DIRECTIVE.fullmatch(directive) is None:
        raise ConfigError(
            f"{directive!r} is not allowed in a job file",
            where="launch.backend",
            remedy="its names and folders may contain A-Z a-z 0-9 . _ / @ : = , + % -; output=FOLDER sets another "
            "folder",
        )
    return directive
