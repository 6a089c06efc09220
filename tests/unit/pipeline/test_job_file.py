"""A stage as a job file: what it says, what it refuses, and what bash makes of it."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.config.backend import SlurmBackend
from alignment.core.errors import ConfigError
from alignment.core.resources import shipped
from alignment.pipeline.backends import command, feasibility, slurm
from alignment.pipeline.backends.slurm_job_file import render
from alignment.pipeline.plan.plan import Plan
from tests.unit.pipeline.conftest import MakePlan

ASKED = (
    "launch/backend=slurm",
    "launch.num_processes=2",
    "launch.backend.partition='gpu,long'",
    "launch.backend.account=lab_7",
    "launch.backend.qos=normal",
    "launch.backend.time=1-12:00:00",
    "launch.backend.gpus=2",
    "launch.backend.cpus=16",
    "launch.backend.memory=128G",
    "launch.backend.signal_seconds=600",
)
GOLDEN = """\
#!/bin/bash
# One stage of a run, as `align run` submits it (docs/design/0010-slurm.md).
#SBATCH --job-name=quickstart.dpo
#SBATCH --output={run}/dpo/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@600
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --partition=gpu,long
#SBATCH --account=lab_7
#SBATCH --qos=normal
#SBATCH --time=1-12:00:00
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G

# Where Slurm ends the whole job (scancel, preemption, the end of its time) it asks this script too. The script then
# waits until the driver has saved and leaves it to Slurm whether the job is queued again: a cancelled one must not be.
ended_by_slurm=no
trap 'ended_by_slurm=yes' TERM

cd '/home/of user' || exit 2
code=0
srun --ntasks=1 --kill-on-bad-exit=1 --cpus-per-task=16 {python} -u -m alignment.cli run quickstart --stage dpo {told} \
launch.backend.submit=false || code=$?

# 75: the stage was asked to stop, and has saved if it could. 143: the driver was asked before it had begun. Queued
# again, the job goes on from what is stored. The driver fails when several attempts in turn have stored nothing.
if {{ [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; }} && [ "$ended_by_slurm" = no ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def rendered(plan: Plan, name: str = "dpo", folder: Path = Path("/home/of user")) -> str:
    """The job file of a stage."""
    (stage,) = (stage for stage in plan.stages if stage.name == name)
    return render(plan, stage, folder=folder)


def test_a_job_of_a_sweep_waits_for_what_another_makes(plan: MakePlan) -> None:
    made = plan(*ASKED)
    (stage,) = (stage for stage in made.stages if stage.name == "dpo")
    assert "--stage dpo --wait " in render(made, stage, folder=Path("/home/user"), wait=True)
    assert "--wait" not in rendered(made)


def directives(text: str) -> list[str]:
    """What the file asks of Slurm."""
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_a_job_file_says_all_that_was_asked_for(plan: MakePlan) -> None:
    made = plan(*ASKED)
    assert rendered(made) == GOLDEN.format(
        run=made.run_folder, python=shlex.quote(sys.executable), told=shlex.join(made.overrides)
    )


def test_a_job_of_sharded_processes_asks_for_their_gpus_and_starts_them_itself(plan: MakePlan) -> None:
    made = plan("launch=zero3", "launch/backend=slurm", "launch.backend.gpus=4")
    text = rendered(made)
    assert "--gpus-per-node=4" in directives(text)
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line.partition(" || ")[0])
    inside = plan(*words[words.index("dpo") + 1 :])
    assert inside.config.launch.sharding.value == "zero3"
    assert slurm.submission(made.config.launch) == SlurmBackend(gpus=4)
    assert slurm.submission(inside.config.launch) is None
    assert command.with_processes(inside.config.launch, num_devices=4).num_processes == 4


def test_what_was_not_asked_for_is_left_to_the_cluster(plan: MakePlan) -> None:
    names = [directive.partition("=")[0] for directive in directives(rendered(plan("launch/backend=slurm")))]
    assert names == ["--job-name", "--output", "--open-mode", "--requeue", "--signal", "--nodes", "--ntasks"]


@pytest.mark.parametrize(("stage", "gpus"), [("sft", ["2"]), ("evaluate", ["2"]), ("report", [])])
def test_a_stage_asks_for_the_gpus_that_it_uses(plan: MakePlan, stage: str, gpus: list[str]) -> None:
    asked = directives(rendered(plan(*ASKED), stage))
    assert [directive.partition("=")[2] for directive in asked if directive.startswith("--gpus-per-node")] == gpus


def test_launch_settings_change_no_result(plan: MakePlan) -> None:
    fingerprints = [stage.fingerprint for stage in plan().stages]
    assert [stage.fingerprint for stage in plan(*ASKED).stages] == fingerprints


@pytest.mark.parametrize("name", ["a\n#SBATCH --uid=0", "a;b", "$(id)", "a b", "a'b", 'a"b'])
def test_a_name_that_slurm_or_a_shell_would_read_gets_into_no_job_file(plan: MakePlan, name: str) -> None:
    made = plan("launch/backend=slurm")
    hostile = dataclasses.replace(made, config=dataclasses.replace(made.config, name=name))
    with pytest.raises(ConfigError, match="is not allowed in a job file"):
        rendered(hostile)


def test_a_folder_with_a_space_is_refused_with_the_remedy(plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        rendered(plan("launch/backend=slurm", f"output='{tmp_path}/two words'"))
    assert "output=FOLDER sets another folder" in str(caught.value)


def test_a_percent_sign_in_a_folder_is_no_pattern_of_slurm(plan: MakePlan, tmp_path: Path) -> None:
    text = rendered(plan("launch/backend=slurm", f"output='{tmp_path}/100%j'"))
    assert f"--output={tmp_path}/100%%j/runs/quickstart/dpo/slurm-%j.log" in directives(text)


FAKES = {
    "srun": 'printf "%s\\0" "$@" > "$FAKES/srun"; if [ "$ENDED" = yes ]; then kill -TERM "$PPID"; fi; exit "$CODE"',
    "scontrol": 'echo "$@" > "$FAKES/scontrol"',
}


def execute(text: str, folder: Path, *, code: int, ended: bool = False) -> tuple[int, Path]:
    """Runs a job file with an ``srun`` that ends with ``code``, Slurm having ``ended`` the whole job or not."""
    for name, body in FAKES.items():
        (folder / name).unlink(missing_ok=True)
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "stage.sbatch").write_text(text)
    variables = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "FAKES": str(folder), "SLURM_JOB_ID": "12"}
    variables |= {"CODE": str(code), "ENDED": "yes" if ended else "no"}
    done = subprocess.run(["bash", str(folder / "stage.sbatch")], env=variables, check=False)
    return done.returncode, folder / "scontrol"


SEVERAL = ("launch/backend=slurm", "launch.backend.num_machines=2", "launch.num_processes=2")


def test_a_job_of_several_machines_asks_for_them_only_where_a_stage_uses_them(plan: MakePlan) -> None:
    made = plan(*SEVERAL)
    for name in ("dpo", "evaluate"):
        assert {"--nodes=2", "--ntasks=2"} <= set(directives(rendered(made, name)))
    text = rendered(made, "report")
    assert {"--nodes=1", "--ntasks=1"} <= set(directives(text))
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line.partition(" || ")[0])
    inside = plan(*words[words.index("report") + 1 :])
    assert [stage.fingerprint for stage in inside.stages] == [stage.fingerprint for stage in made.stages]


def test_a_smoke_job_on_one_machine_names_what_several_have_trained(plan: MakePlan) -> None:
    """The profile scales batches with the processes of all machines, also in the plan of a stage that needs one."""
    made = plan("profile=smoke", *SEVERAL)
    (line,) = (line for line in rendered(made, "report").splitlines() if line.startswith("srun "))
    words = shlex.split(line.partition(" || ")[0])
    inside = plan(*words[words.index("report") + 1 :])
    assert [stage.fingerprint for stage in inside.stages] == [stage.fingerprint for stage in made.stages]


def test_batches_are_planned_for_the_processes_of_all_machines(plan: MakePlan) -> None:
    assert plan(*SEVERAL).config.launch.world_size == 4
    with pytest.raises(ConfigError, match="6 is not divisible by 4 processes"):
        feasibility.refuse_sizes(plan(*SEVERAL, "stages.sft.optim.batch_size=6"))


def test_a_rank_is_refused_where_slurm_gives_it(plan: MakePlan) -> None:
    with pytest.raises(ConfigError, match="machine_rank: 1, but Slurm assigns ranks to machines"):
        plan(*SEVERAL, "launch.backend.machine_rank=1")


def test_each_machine_of_a_job_gets_its_rank_and_the_address_of_the_first(plan: MakePlan, tmp_path: Path) -> None:
    """``srun`` starts its command once on each machine; here it is played for the second one."""
    made = plan(*SEVERAL)
    scontrol = """
case "$2" in
  hostnames) printf 'gpu07\\ngpu08\\n' ;;
  node) echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.0.0.${3#gpu0} NodeHostName=$3" ;;
esac"""
    srun = 'printf "%s\\0" "$@" > "$FAKES/step"; while [ "$1" != bash ]; do shift; done; SLURM_PROCID=1 exec "$@"'
    for name, body in {"scontrol": scontrol, "srun": srun, "driver": 'printf "%s\\0" "$@" > "$FAKES/driver"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = rendered(made, folder=tmp_path).replace(shlex.quote(sys.executable), str(tmp_path / "driver"))
    (tmp_path / "stage.sbatch").write_text(text)
    (tmp_path / "said").mkdir()
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FAKES": str(tmp_path / "said")}
    variables |= {"SLURM_JOB_ID": "20012", "SLURM_JOB_NODELIST": "gpu0[7-8]"}
    subprocess.run(["bash", str(tmp_path / "stage.sbatch")], env=variables, check=True)
    step = (tmp_path / "said/step").read_text().split("\0")
    assert step[:5] == ["--ntasks=2", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]
    words = (tmp_path / "said/driver").read_text().split("\0")
    inside = plan(*words[words.index("dpo") + 1 : -1]).config.launch
    assert slurm.submission(inside) is None
    assert (inside.backend.num_machines, inside.backend.machine_rank) == (2, 1)
    command_line = command.here(inside, tmp_path / "stage.yaml").argv
    assert "--node_rank 1 --master_addr 10.0.0.7 --master_port 28012" in " ".join(command_line)


@pytest.mark.parametrize(
    ("code", "ended", "requeued"),
    [(0, False, False), (75, False, True), (143, False, True), (6, False, False), (75, True, False)],
)
def test_only_a_job_that_saved_and_was_not_ended_by_slurm_queues_itself_again(
    plan: MakePlan, tmp_path: Path, code: int, ended: bool, requeued: bool
) -> None:
    exit_code, scontrol = execute(
        rendered(plan("launch/backend=slurm"), folder=tmp_path), tmp_path, code=code, ended=ended
    )
    assert exit_code == code
    assert scontrol.exists() == requeued
    assert not requeued or scontrol.read_text() == "requeue 12\n"


def test_every_word_reaches_the_driver_as_it_was_written(plan: MakePlan, tmp_path: Path) -> None:
    summary = 'summary="it\'s; $(touch here) `x` \\n"\n'
    made = dataclasses.replace(plan("launch/backend=slurm"), overrides=(summary,))
    execute(rendered(made, folder=tmp_path), tmp_path, code=0)
    words = (tmp_path / "srun").read_text().split("\0")
    assert words[words.index("dpo") + 1 :] == [summary, "launch.backend.submit=false", ""]
    assert not (tmp_path / "here").exists()


def test_the_template_lies_where_the_package_ships_it() -> None:
    assert (shipped("launch") / "slurm/stage.sbatch").is_file()
