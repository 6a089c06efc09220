"""Runs on Slurm: the job file of a stage, the chain of jobs, and what is known of them.

Slurm's commands are scripts that note what they are given and answer what a test laid down.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from alignment import cli
from alignment.core.errors import AlignmentError, Busy, ConfigError, DiskError, NonFiniteError, Preempted, StageError
from alignment.pipeline.backends import command, slurm, slurm_jobs
from alignment.pipeline.backends.slurm_jobs import render
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.plan.plan import Plan, make_plan
from tests.unit.pipeline.conftest import (
    MakePlan,
    changed,
    faulty_keys,
    leave_all,
    leave_artifact,
    printed_by_run,
    stage_of,
    status_of,
    write,
)

ON_SLURM = "launch/backend=slurm"
ASKED = (
    ON_SLURM,
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
SEVERAL = (ON_SLURM, "launch.backend.num_machines=2", "launch.num_processes=2")


def rendered(plan: Plan, name: str = "dpo", folder: Path = Path("/home/of user"), *, wait: bool = False) -> str:
    return render(plan, stage_of(plan, name), folder=folder, wait=wait)


def directives(text: str) -> dict[str, str]:
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in asked)}


def plan_inside(plan: MakePlan, text: str, stage: str = "dpo") -> Plan:
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line.partition(" || ")[0])
    return plan(*words[words.index(stage) + 1 :])


def test_a_job_file_says_all_that_was_asked_for_and_leaves_the_rest_to_the_cluster(plan: MakePlan) -> None:
    made = plan(*ASKED)
    text = rendered(made)
    common = ["job-name", "output", "open-mode", "requeue", "signal", "nodes", "ntasks"]
    values = ["quickstart.dpo", f"{made.run_folder}/dpo/slurm-%j.log", "append", "", "TERM@600", "1", "1"]
    own = {"partition": "gpu,long", "account": "lab_7", "qos": "normal", "time": "1-12:00:00"}
    own |= {"gpus-per-node": "2", "cpus-per-task": "16", "mem": "128G"}
    assert directives(text) == dict(zip(common, values, strict=True)) | own
    assert text.startswith("#!/bin/bash\n")
    assert "\ncd '/home/of user' || exit 2\n" in text
    driver = f"{shlex.quote(sys.executable)} -u -m alignment.cli run quickstart --stage dpo "
    step = f"srun --ntasks=1 --kill-on-bad-exit=1 --cpus-per-task=16 {driver}{shlex.join(made.overrides)} "
    assert f"\n{step}launch.backend.submit=false || code=$?\n" in text
    gpus = [directives(rendered(made, stage)).get("gpus-per-node") for stage in ("sft", "evaluate", "report")]
    assert gpus == ["2", "2", None], "a stage asks for those that it uses"
    assert list(directives(rendered(plan(ON_SLURM)))) == common
    assert changed(plan(), made) == []
    assert f"{driver}--wait " in rendered(made, wait=True), "as for a sweep, which waits for what another makes"


@pytest.mark.parametrize("more", [(), ("profile=smoke",)])
def test_a_job_asks_for_machines_only_where_a_stage_uses_them(plan: MakePlan, more: tuple[str, ...]) -> None:
    """The profile scales batches with the processes of all machines, also in the plan of a stage that needs one."""
    made = plan(*more, *SEVERAL)
    for name, machines in (("dpo", "2"), ("evaluate", "2"), ("report", "1")):
        asked = directives(rendered(made, name))
        assert (asked["nodes"], asked["ntasks"]) == (machines, machines)
    assert changed(made, plan_inside(plan, rendered(made, "report"), "report")) == []


@pytest.mark.parametrize("name", ["a\n#SBATCH --uid=0", "$(id)", "a b"])
def test_a_name_that_slurm_or_a_shell_would_read_gets_into_no_job_file(plan: MakePlan, name: str) -> None:
    made = plan(ON_SLURM)
    hostile = dataclasses.replace(made, config=dataclasses.replace(made.config, name=name))
    with pytest.raises(ConfigError, match="is not allowed in a job file"):
        rendered(hostile)


def commands(folder: Path, **bodies: str) -> None:
    for name, body in bodies.items():
        Path(write(folder / name, f"#!/bin/sh\n{body}\n")).chmod(0o755)


def bash(text: str, folder: Path, **variables: str) -> int:
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "FAKES": str(folder), "SLURM_JOB_ID": "20012"}
    file = write(folder / "stage.sbatch", text)
    return subprocess.run(["bash", file], env=environment | variables, check=False).returncode


@pytest.mark.parametrize(
    ("code", "ended", "requeued"),
    [(0, "no", False), (75, "no", True), (6, "no", False), (75, "yes", False)],
)
def test_a_job_that_saved_queues_itself(plan: MakePlan, tmp_path: Path, code: int, ended: str, requeued: bool) -> None:
    summary = 'summary="it\'s; $(touch here) `x` \\n"\n'
    notes = 'printf "%s\\0" "$@" > "$FAKES/srun"; if [ "$ENDED" = yes ]; then kill -TERM "$PPID"; fi; exit "$CODE"'
    commands(tmp_path / "bin", srun=notes, scontrol='echo "$@" > "$FAKES/scontrol"')
    made = dataclasses.replace(plan(ON_SLURM), overrides=(summary,))
    assert bash(rendered(made, folder=tmp_path), tmp_path, CODE=str(code), ENDED=ended) == code
    scontrol = tmp_path / "scontrol"
    assert (scontrol.read_text() if scontrol.exists() else "") == "requeue 20012\n" * requeued
    words = (tmp_path / "srun").read_text().split("\0")
    assert words[words.index("dpo") + 1 :] == [summary, "launch.backend.submit=false", ""]
    assert not (tmp_path / "here").exists()


def test_each_machine_of_a_job_gets_its_rank_and_the_address_of_the_first(plan: MakePlan, tmp_path: Path) -> None:
    """``srun`` starts its command once on each machine; here it is played for the second one."""
    commands(
        tmp_path / "bin",
        scontrol="""case "$2" in
  hostnames) printf 'gpu07\\ngpu08\\n' ;;
  node) echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.0.0.${3#gpu0} NodeHostName=$3" ;;
esac""",
        srun='printf "%s\\0" "$@" > "$FAKES/step"; while [ "$1" != bash ]; do shift; done; SLURM_PROCID=1 exec "$@"',
        driver='printf "%s\\0" "$@" > "$FAKES/driver"',
    )
    text = rendered(plan(*SEVERAL), folder=tmp_path).replace(shlex.quote(sys.executable), str(tmp_path / "bin/driver"))
    assert bash(text, tmp_path, SLURM_JOB_NODELIST="gpu0[7-8]") == 0
    step = (tmp_path / "step").read_text().split("\0")
    assert step[:5] == ["--ntasks=2", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]
    words = (tmp_path / "driver").read_text().split("\0")
    inside = plan(*words[words.index("dpo") + 1 : -1]).config.launch
    assert slurm.submission(inside) is None
    assert (inside.backend.num_machines, inside.backend.machine_rank) == (2, 1)
    command_line = command.here(inside, tmp_path / "stage.yaml").argv
    assert "--node_rank 1 --master_addr 10.0.0.7 --master_port 28012" in " ".join(command_line)


SBATCH = """
number=$(($(ls "$FAKES"/submitted.* 2>/dev/null | wc -l) + 11))
echo "$@" > "$FAKES/submitted.$number"
if [ "$number" = "$REFUSED" ]; then echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; fi
echo "$number;cluster"
"""
SQUEUE = """
number=$(($(ls "$FAKES"/asked.* 2>/dev/null | wc -l) + 1))
echo "$@" > "$FAKES/asked.$number"
cat "$FAKES/answer.$number" 2>/dev/null || cat "$FAKES/answer" 2>/dev/null
"""
SIX_STAGES = "~stages.evaluate_sft"
STAGES = ["sft", "reward", "dpo", "ppo", "evaluate", "report"]


class Fakes:
    """Slurm's commands in a folder that comes first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command(sbatch=SBATCH, squeue=SQUEUE, scancel='echo "$@" > "$FAKES/cancelled"')

    def command(self, **bodies: str) -> None:
        commands(self.folder / "bin", **bodies)

    def answers(self, *answers: str | list[str]) -> None:
        texts = ["".join(f"{row}\n" for row in ([rows] if isinstance(rows, str) else rows)) for rows in answers]
        for number, text in enumerate(texts, start=1):
            (self.folder / f"answer.{number}").write_text(text)
        (self.folder / "answer").write_text(texts[-1])
        for asked in self.folder.glob("asked.*"):
            asked.unlink()

    def submitted(self) -> list[list[str]]:
        return [path.read_text().split() for path in sorted(self.folder.glob("submitted.*"))]

    def names(self) -> list[str]:
        return [Path(words[-1]).parent.name for words in self.submitted()]

    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes(tmp_path / "fakes")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKES", str(made.folder))
    monkeypatch.setattr(slurm_jobs, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(slurm_jobs, "_SHOWN_LATE_SECONDS", 0.0)
    return made


Submit = Callable[..., str]


@pytest.fixture
def submit(fakes: Fakes, overrides: list[str]) -> Submit:
    def call(*more: str, only: str | None = None, code: int = 0) -> str:
        settings = [*overrides, SIX_STAGES, ON_SLURM, "launch.backend.wait=false", *more]
        return printed_by_run(settings, only=only, code=code)

    return call


@pytest.fixture
def run_folder(overrides: list[str]) -> Path:
    return Path(overrides[0].removeprefix("output=")) / "runs/quickstart"


def record(run_folder: Path, **changes: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_folder / "run.json").read_text()) | changes
    (run_folder / "run.json").write_text(json.dumps(content))
    return content


def test_each_job_waits_for_the_one_before(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    printed = submit()
    files = [str(run_folder / name / "stage.sbatch") for name in STAGES]
    after = [[f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] for job in range(11, 16)]
    expected = [["--parsable", *words, file] for words, file in zip([[], *after], files, strict=True)]
    assert fakes.submitted() == expected
    assert slurm_jobs.read_jobs(run_folder) == {name: str(job) for job, name in enumerate(STAGES, start=11)}
    assert "dpo: job 13" in printed
    output = run_folder.parent.parent
    assert f"`align status quickstart --output {output}` shows them, `scancel 11 12 13 14 15 16` ends them" in printed
    assert (record(run_folder)["state"], {of["state"] for of in record(run_folder)["stages"].values()}) == (
        "waiting", {"waiting"})  # fmt: skip
    fakes.answers(["11 RUNNING 0:0 None", "12 PENDING 0:0 Dependency"])
    for line in (r"sft +waiting .*job 11 RUNNING", r"reward +waiting .*job 12 PENDING \(Dependency\)", "ppo .*job 14"):
        assert re.search(rf"^{line} *$", status_of(run_folder.parents[1]), re.MULTILINE)
    monkeypatch.setenv("PATH", str(tmp_path))  # status needs no Slurm
    assert re.search(r"^sft +waiting .*job 11 *$", status_of(run_folder.parents[1]), re.MULTILINE)


def test_a_plan_writes_the_bytes_that_a_run_submits_and_submits_nothing(
    submit: Submit, fakes: Fakes, overrides: list[str], run_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The plan has no Slurm, and its files are compared with those that the run gives to ``sbatch``."""
    leave_artifact(make_plan("quickstart", overrides).stages[0])
    settings = [SIX_STAGES, ON_SLURM, "launch.backend.wait=false", "launch.backend.partition=gpu"]
    with monkeypatch.context() as without_slurm:
        without_slurm.setenv("PATH", str(tmp_path))
        assert cli.main(["plan", "quickstart", *overrides, *settings, "--scripts", str(tmp_path / "jobs")]) == 0
    assert (run_folder.exists(), fakes.submitted()) == (False, [])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("written: ")]
    assert lines == [f"written: {tmp_path / 'jobs' / name}.sbatch" for name in STAGES[1:]]
    submit("launch.backend.partition=gpu")
    assert fakes.names() == STAGES[1:]
    written = {file.stem: file.read_bytes() for file in (tmp_path / "jobs").iterdir()}
    assert written == {Path(words[-1]).parent.name: Path(words[-1]).read_bytes() for words in fakes.submitted()}
    assert b"#SBATCH --partition=gpu\n" in written["dpo"]


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_refusal_of_slurm_is_shown_and_cancels_what_was_submitted(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch, is_cancelled: bool
) -> None:
    monkeypatch.setenv("REFUSED", "13")
    if not is_cancelled:
        fakes.command(scancel="exit 1")
    with pytest.raises(ConfigError, match="invalid partition specified: gpu") as caught:
        submit("launch.backend.partition=gpu")
    assert caught.value.where == str(run_folder / "dpo/stage.sbatch")
    assert fakes.cancelled() == ["11", "12"] * is_cancelled
    assert list(slurm_jobs.read_jobs(run_folder).values()) == ["11", "12"] * (not is_cancelled)
    assert ("jobs 11, 12 could not be cancelled" in caught.value.remedy) == (not is_cancelled)


AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize("submitted", ["true", "false"])
def test_a_run_with_jobs_is_not_started_twice(submit: Submit, fakes: Fakes, run_folder: Path, submitted: str) -> None:
    submit()
    fakes.answers(["11 COMPLETED 0:0 None", "12 PENDING 0:0 Priority"])
    with pytest.raises(Busy, match=r"reward \(job 12\)") as caught:
        submit(f"launch.backend.submit={submitted}")
    assert f"`align status quickstart --output {run_folder.parent.parent}`" in caught.value.remedy
    assert "`scancel 12`" in caught.value.remedy
    for squeue in ('echo "Unable to contact slurm controller" >&2; exit 1', None):
        fakes.command(squeue=squeue or "")
        if squeue is None:
            (fakes.folder / "bin/squeue").unlink()
        with pytest.raises(Busy, match=r"Slurm does not answer.*sft \(job 11\), reward \(job 12\)") as caught:
            submit(f"launch.backend.submit={submitted}")
        assert f"delete {run_folder / 'jobs.json'}" in caught.value.remedy
    assert len(fakes.submitted()) == 6
    fakes.command(squeue=SQUEUE)
    fakes.answers(["11 COMPLETED 0:0 None", "12 CANCELLED 0:15 None"])
    submit()
    assert len(fakes.submitted()) == 12


@pytest.fixture
def sft(fakes: Fakes, overrides: list[str]) -> Plan:
    plan = make_plan("quickstart", [*overrides, ON_SLURM])
    plan.run_folder.mkdir(parents=True)
    RunRecorder(plan)
    return plan


def follow(plan: Plan) -> list[str]:
    lines: list[str] = []

    def wait(stage: str, reason: str) -> None:
        line = f"{stage}: {reason or 'waits no longer'}"
        lines.extend([line] * (line not in lines[-1:]))

    screen = mock.Mock(note=lines.append, wait=wait)
    slurm_jobs.follow(plan, plan.stages[:1], {"sft": "11"}, screen)
    assert screen.poll.call_count > len(lines)
    return lines


def test_a_job_is_followed_through_the_queue_and_through_being_queued_again(sft: Plan, fakes: Fakes) -> None:
    leave_artifact(sft.stages[0])
    states = ["PENDING 0:0 Resources"] * 2 + ["RUNNING 0:0 None", "COMPLETING 0:0 None", "PENDING 0:0 BeginTime"]
    fakes.answers(*(f"11 {state}" for state in [*states, "RUNNING 0:0 None", "COMPLETED 0:0 None"]))
    assert follow(sft) == [
        "sft: job 11 PENDING (Resources)",
        "sft: waits no longer",
        "sft: job 11 was queued again; the stage continues from what it has stored",
        "sft: job 11 PENDING (BeginTime)",
        "sft: waits no longer",
    ]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("FAILED 6:0 NonZeroExitCode", NonFiniteError),
        ("FAILED 12:0 NonZeroExitCode", DiskError),
        ("CANCELLED 0:15 None", Preempted),
        ("FAILED 75:0 NonZeroExitCode", Preempted),
        ("TIMEOUT 0:0 TimeLimit", StageError),
        ("COMPLETED 0:0 None", ConfigError),
    ],
)
def test_a_job_ends_the_run_as_its_driver_ended(
    sft: Plan, fakes: Fakes, answer: str, error: type[AlignmentError]
) -> None:
    log = write(sft.run_folder / "sft/slurm-11.log", "stage sft: the loss is NaN at step 3\n")
    fakes.answers(f"11 {answer}")
    with pytest.raises(error) as caught:
        follow(sft)
    assert (type(caught.value), faulty_keys(caught.value)) == (error, ["stage sft"])
    assert f"log: {log}" in str(caught.value)
    assert ("run the same command to continue" in str(caught.value)) == (error is Preempted)
    assert "the loss is NaN" in str(caught.value) or error is ConfigError


def test_states_of_a_job_mean_what_slurm_documents() -> None:
    """The states of https://slurm.schedmd.com/job_state_codes.html."""
    over = ["BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"]
    goes_on = ["PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED", "SIGNALING", "STAGE_OUT", "COMPLETING"]
    assert [state for state in (*over, *goes_on) if slurm.Job(state=state).ended] == over


def test_a_forgotten_job_is_looked_up_in_the_accounts(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.command(
        squeue='echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1',
        sacct='echo "11|CANCELLED by 1000|0:0"; echo "12|FAILED|9:0"',
    )
    cancelled, failed = slurm.Job(state="CANCELLED"), slurm.Job(state="FAILED", exit_code=9)
    assert slurm.look(["11", "12", "13"]) == {"11": cancelled, "12": failed}
    fakes.command(squeue='echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    assert slurm.look(["11"]) is None
    fakes.command(squeue="exec sleep 60")
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 0.05)
    assert slurm.look(["11"]) is None


@pytest.mark.parametrize(
    ("sbatch", "reason"),
    [(f"echo '{AWAY}' >&2; exit 1", AWAY), ("exec sleep 60", "no answer in 0 seconds")],
    ids=["away", "hangs"],
)
def test_a_controller_that_is_away_is_no_fault_of_the_settings(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, reason: str
) -> None:
    """A sweep records faults of settings for good."""
    monkeypatch.setattr(slurm, "_SUBMIT_SECONDS", 0.2)
    fakes.command(sbatch=sbatch)
    with pytest.raises(Busy) as caught:
        submit()
    assert (reason in caught.value.message, caught.value.where) == (True, str(run_folder / "sft/stage.sbatch"))


def test_a_chain_that_is_waited_for_ends_with_its_results_and_may_be_left(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    waits = "launch.backend.wait=true"
    with monkeypatch.context() as left:
        left.setattr(slurm_jobs, "follow", interrupted)
        assert "the jobs continue: `align status quickstart --output " in submit(waits, code=130)
    assert fakes.cancelled() == []
    fakes.answers("11 COMPLETED 0:0 None")
    monkeypatch.setattr(slurm_jobs, "follow", lambda *_: (run_folder / "report.html").touch())
    assert f"report: {run_folder / 'report.html'}" in submit(waits)


def test_a_run_whose_lock_is_not_seen_here_is_as_its_jobs_are(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit()
    record(run_folder, state="running")
    for answer, state in (("11 RUNNING 0:0 None", "running"), ("11 FAILED 1:0 NonZeroExitCode", "killed")):
        fakes.answers(answer)
        assert status_of(run_folder.parents[1]).split()[:2] == ["quickstart", state]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status_of(run_folder.parents[1]).split()[:2] == ["quickstart", "unknown"]
    assert "Slurm does not answer" in status_of(run_folder.parents[1])


def test_job_scripts_are_not_written_without_slurm_over_files_or_for_results_that_are_there(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "jobs"
    planned, scripts = ["plan", "quickstart", *overrides], ["--scripts", str(folder)]
    assert cli.main([*planned, *scripts]) == 2
    assert ON_SLURM in capsys.readouterr().err
    assert not folder.exists()
    folder.mkdir()
    assert cli.main([*planned, ON_SLURM, *scripts]) == 2
    assert f"--scripts: {str(folder)!r} exists already" in capsys.readouterr().err
    folder.rmdir()
    assert cli.main(["run", "quickstart", *overrides, ON_SLURM]) == 2
    assert "launch.backend: there is no sbatch on this machine" in capsys.readouterr().err
    leave_all(make_plan("quickstart", overrides))
    assert cli.main([*planned, ON_SLURM, *scripts]) == 0
    assert "no job scripts, because nothing has to run" in capsys.readouterr().out
    assert not folder.exists()
