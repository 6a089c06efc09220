"""A run as a chain of jobs, with commands of Slurm that note what they are given and answer what a test laid down."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from alignment import cli
from alignment.commands.status import show_status
from alignment.core.errors import (
    AlignmentError,
    Busy,
    ConfigError,
    DiskError,
    NonFiniteError,
    Preempted,
    StageError,
    StoreError,
)
from alignment.pipeline.backends import late_results, slurm, slurm_jobs
from alignment.pipeline.execute.record import RunRecorder
from alignment.pipeline.execute.run import run
from alignment.pipeline.plan.plan import Plan, make_plan
from tests.unit.pipeline.conftest import leave_artifact
from tests.unit.pipeline.test_run import fake

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


class Fakes:
    """Slurm's commands in a folder that comes first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self.command("sbatch", SBATCH)
        self.command("squeue", SQUEUE)
        self.command("scancel", 'echo "$@" > "$FAKES/cancelled"')

    def command(self, name: str, body: str) -> None:
        """Writes one of the commands."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def answers(self, *answers: list[str]) -> None:
        """What ``squeue`` says the next times, rows of id, state, exit code and reason; the last for good."""
        for number, rows in enumerate(answers, start=1):
            (self.folder / f"answer.{number}").write_text("".join(f"{row}\n" for row in rows))
        (self.folder / "answer").write_text("".join(f"{row}\n" for row in answers[-1]))
        for asked in self.folder.glob("asked.*"):
            asked.unlink()

    def submitted(self) -> list[list[str]]:
        """The arguments of every ``sbatch``, in order."""
        return [path.read_text().split() for path in sorted(self.folder.glob("submitted.*"))]

    def cancelled(self) -> list[str]:
        """The jobs that ``scancel`` was given last."""
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """A cluster on which nothing happens by itself."""
    made = Fakes(tmp_path / "fakes")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKES", str(made.folder))
    monkeypatch.setattr(slurm_jobs, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(late_results, "_SHOWN_LATE_SECONDS", 0.0)
    return made


Submit = Callable[..., str]


@pytest.fixture
def submit(fakes: Fakes, overrides: list[str]) -> Submit:
    """``align run quickstart launch/backend=slurm`` that does not wait; returns what it prints."""

    def call(*more: str, only: str | None = None, code: int = 0) -> str:
        screen = StringIO()
        arguments = [*overrides, "launch/backend=slurm", "launch.backend.wait=false", *more]
        assert run("quickstart", arguments, console=Console(file=screen, width=120), only=only) == code
        return screen.getvalue()

    return call


@pytest.fixture
def run_folder(overrides: list[str]) -> Path:
    """Where the run is recorded."""
    return Path(overrides[0].removeprefix("output=")) / "runs/quickstart"


def record(run_folder: Path) -> dict[str, Any]:
    """The content of run.json."""
    content: dict[str, Any] = json.loads((run_folder / "run.json").read_text())
    return content


def test_each_job_waits_for_the_one_before(submit: Submit, fakes: Fakes, run_folder: Path) -> None:
    printed = submit()
    names = ["sft", "reward", "dpo", "ppo", "evaluate", "report"]
    files = [str(run_folder / name / "stage.sbatch") for name in names]
    after = [[f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"] for job in range(11, 16)]
    expected = [["--parsable", *words, file] for words, file in zip([[], *after], files, strict=True)]
    assert fakes.submitted() == expected
    assert slurm_jobs.read_jobs(run_folder) == {name: str(job) for job, name in enumerate(names, start=11)}
    assert "dpo: job 13" in printed
    output = run_folder.parent.parent
    assert f"`align status quickstart --output {output}` shows them, `scancel 11 12 13 14 15 16` ends them" in printed
    assert record(run_folder)["state"] == "waiting"
    assert {stage["state"] for stage in record(run_folder)["stages"].values()} == {"waiting"}


def test_what_is_made_already_needs_no_job(submit: Submit, fakes: Fakes, overrides: list[str]) -> None:
    plan = make_plan("quickstart", overrides)
    for stage in plan.stages[:4]:
        stage.work.mkdir(parents=True)
        leave_artifact(stage)
    assert "sft: reused" in submit()
    assert [Path(words[-1]).parent.name for words in fakes.submitted()] == ["evaluate", "report"]


def test_one_stage_is_submitted_alone(submit: Submit, fakes: Fakes) -> None:
    submit(only="sft")
    assert [Path(words[-1]).parent.name for words in fakes.submitted()] == ["sft"]


def test_a_plan_writes_the_bytes_that_a_run_submits_and_submits_nothing(
    submit: Submit,
    fakes: Fakes,
    overrides: list[str],
    run_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The plan has no Slurm, and its files are compared with those that the run gives to ``sbatch``."""
    stage = make_plan("quickstart", overrides).stages[0]
    stage.work.mkdir(parents=True)
    leave_artifact(stage)
    slurm_settings = ["launch/backend=slurm", "launch.backend.wait=false", "launch.backend.partition=gpu"]
    with monkeypatch.context() as without_slurm:
        without_slurm.setenv("PATH", str(tmp_path))
        assert cli.main(["plan", "quickstart", *overrides, *slurm_settings, "--scripts", str(tmp_path / "jobs")]) == 0
    assert not run_folder.exists()
    assert fakes.submitted() == []
    names = ["reward", "dpo", "ppo", "evaluate", "report"]
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("written: ")] == [
        f"written: {tmp_path / 'jobs' / name}.sbatch" for name in names
    ]
    submit("launch.backend.partition=gpu")
    files = [Path(words[-1]) for words in fakes.submitted()]
    assert [file.parent.name for file in files] == names
    written = {file.name: file.read_bytes() for file in (tmp_path / "jobs").iterdir()}
    assert written == {f"{file.parent.name}.sbatch": file.read_bytes() for file in files}
    assert b"#SBATCH --partition=gpu\n" in written["dpo.sbatch"]


def test_job_scripts_are_refused_before_anything_is_written_if_there_can_be_none(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = ["plan", "quickstart", *overrides]
    folder = tmp_path / "jobs"
    assert cli.main([*planned, "--scripts", str(folder)]) == 2
    assert capsys.readouterr().err == (
        "configuration: --scripts: this plan does not run on Slurm, so there are no job scripts\n"
        "  → add launch/backend=slurm, or leave out --scripts\n"
    )
    assert not folder.exists()
    folder.mkdir()
    assert cli.main([*planned, "launch/backend=slurm", "--scripts", str(folder)]) == 2
    assert f"--scripts: {str(folder)!r} exists already" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_if_nothing_has_to_run_there_are_no_job_scripts(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage in make_plan("quickstart", overrides).stages:
        stage.work.mkdir(parents=True)
        leave_artifact(stage)
    folder = tmp_path / "jobs"
    assert cli.main(["plan", "quickstart", *overrides, "launch/backend=slurm", "--scripts", str(folder)]) == 0
    assert "no job scripts, because nothing has to run" in capsys.readouterr().out
    assert not folder.exists()


def test_without_slurm_the_command_says_so(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["run", "quickstart", *overrides, "launch/backend=slurm"]) == 2
    assert capsys.readouterr().err == (
        "configuration: launch.backend: there is no sbatch on this machine\n"
        "  → run the command on a login node of the cluster, load its slurm module, or use launch/backend=local\n"
    )


def test_a_refusal_of_slurm_is_shown_and_cancels_what_was_submitted(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "13")
    with pytest.raises(ConfigError) as caught:
        submit("launch.backend.partition=gpu")
    assert "sbatch refused it: sbatch: error: invalid partition specified: gpu" in str(caught.value)
    assert caught.value.where == str(run_folder / "dpo/stage.sbatch")
    assert fakes.cancelled() == ["11", "12"]
    assert slurm_jobs.read_jobs(run_folder) == {}


AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("sbatch", "reason"),
    [(f"echo '{AWAY}' >&2; exit 1", AWAY), ("exec sleep 60", "sbatch gave no answer in 0 seconds")],
    ids=["away", "hangs"],
)
def test_a_controller_that_is_away_is_no_fault_of_the_settings(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, reason: str
) -> None:
    """A sweep records faults of settings for good."""
    monkeypatch.setattr(slurm, "_SUBMIT_SECONDS", 0.2)
    fakes.command("sbatch", sbatch)
    with pytest.raises(Busy) as caught:
        submit()
    assert caught.value.message == f"Slurm does not answer: {reason}"
    assert caught.value.where == str(run_folder / "sft/stage.sbatch")


def test_jobs_that_could_not_be_cancelled_are_not_forgotten(
    submit: Submit, fakes: Fakes, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "13")
    fakes.command("scancel", "exit 1")
    with pytest.raises(ConfigError) as caught:
        submit("launch.backend.partition=gpu")
    assert "jobs 11, 12 could not be cancelled and may still run; cancel them with scancel" in caught.value.remedy
    assert list(slurm_jobs.read_jobs(run_folder).values()) == ["11", "12"]


@pytest.mark.parametrize("submitted", ["true", "false"])
def test_a_run_whose_jobs_wait_is_not_started_twice(
    submit: Submit, fakes: Fakes, run_folder: Path, submitted: str
) -> None:
    submit()
    fakes.answers(["11 COMPLETED 0:0 None", "12 PENDING 0:0 Priority"])
    with pytest.raises(Busy, match=r"Slurm has jobs of this run: reward \(job 12\)") as caught:
        submit(f"launch.backend.submit={submitted}")
    assert caught.value.remedy == (
        f"`align status quickstart --output {run_folder.parent.parent}` shows them, `scancel 12` ends them"
    )
    assert len(fakes.submitted()) == 6
    fakes.answers(["11 COMPLETED 0:0 None", "12 CANCELLED 0:15 None"])
    submit()
    assert len(fakes.submitted()) == 12


def test_a_stage_whose_job_waits_is_started_by_that_job_alone(
    submit: Submit, fakes: Fakes, overrides: list[str]
) -> None:
    submit()
    fakes.answers(["11 RUNNING 0:0 None", "12 PENDING 0:0 Dependency"])
    console = Console(file=StringIO())
    with pytest.raises(Busy, match=r"Slurm has jobs of this run: sft \(job 11\), reward \(job 12\)"):
        run("quickstart", overrides, console=console, only="sft", command_for=fake)
    of_job = [*overrides, "launch/backend=slurm", "launch.backend.submit=false"]
    assert run("quickstart", of_job, console=console, only="sft", command_for=fake) == 0


@pytest.mark.parametrize("submitted", ["true", "false"])
@pytest.mark.parametrize("squeue", ['echo "Unable to contact slurm controller" >&2; exit 1', None])
def test_nothing_is_submitted_while_it_is_unknown_whether_jobs_run(
    submit: Submit, fakes: Fakes, run_folder: Path, squeue: str | None, submitted: str
) -> None:
    submit()
    if squeue is None:
        (fakes.folder / "bin/squeue").unlink()
    else:
        fakes.command("squeue", squeue)
    with pytest.raises(Busy, match=r"Slurm does not answer.*sft \(job 11\), reward \(job 12\)") as caught:
        submit(f"launch.backend.submit={submitted}")
    assert caught.value.remedy == (
        f"try again when squeue works here; if the jobs have ended, delete {run_folder / 'jobs.json'}"
    )
    assert len(fakes.submitted()) == 6


def test_leaving_a_chain_leaves_its_jobs(submit: Submit, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_jobs, "follow", _interrupted)
    assert "the jobs continue: `align status quickstart --output " in submit("launch.backend.wait=true", code=130)
    assert fakes.cancelled() == []


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_chain_that_was_waited_for_ends_with_its_results(
    submit: Submit, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "follow", lambda *_: (run_folder / "report.html").touch())
    assert f"report: {run_folder / 'report.html'}" in submit("launch.backend.wait=true")


class Screen:
    """Notes what a user would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.polls = 0

    def note(self, text: str) -> None:
        self.lines.append(text)

    def wait(self, stage: str, reason: str) -> None:
        line = f"{stage}: {reason or 'waits no longer'}"
        if line not in self.lines[-1:]:
            self.lines.append(line)

    def poll(self) -> None:
        self.polls += 1


@pytest.fixture
def sft(fakes: Fakes, overrides: list[str]) -> Plan:
    """A plan of which SFT was submitted as job 11."""
    plan = make_plan("quickstart", [*overrides, "launch/backend=slurm"])
    plan.run_folder.mkdir(parents=True)
    RunRecorder(plan)
    return plan


def follow(plan: Plan) -> list[str]:
    """What is shown while job 11 is followed."""
    screen = Screen()
    slurm_jobs.follow(plan, plan.stages[:1], {"sft": "11"}, screen)
    assert screen.polls > len(screen.lines)
    return screen.lines


def test_a_job_is_followed_through_the_queue_and_through_being_queued_again(sft: Plan, fakes: Fakes) -> None:
    stage = sft.stages[0]
    stage.work.mkdir(parents=True)
    leave_artifact(stage)
    fakes.answers(
        ["11 PENDING 0:0 Resources"],
        ["11 PENDING 0:0 Resources"],
        ["11 RUNNING 0:0 None"],
        ["11 COMPLETING 0:0 None"],
        ["11 PENDING 0:0 BeginTime"],
        ["11 RUNNING 0:0 None"],
        ["11 COMPLETED 0:0 None"],
    )
    assert follow(sft) == [
        "sft: job 11 PENDING (Resources)",
        "sft: waits no longer",
        "sft: job 11 was queued again; the stage continues from what it has stored",
        "sft: job 11 PENDING (BeginTime)",
        "sft: waits no longer",
    ]


@pytest.mark.parametrize(
    ("answer", "error", "code"),
    [
        ("11 FAILED 6:0 NonZeroExitCode", NonFiniteError, 6),
        ("11 FAILED 11:0 NonZeroExitCode", StoreError, 11),
        ("11 FAILED 12:0 NonZeroExitCode", DiskError, 12),
        ("11 CANCELLED 0:15 None", Preempted, 75),
        ("11 PREEMPTED 0:15 None", Preempted, 75),
        ("11 CANCELLED 75:0 None", Preempted, 75),
        ("11 FAILED 75:0 NonZeroExitCode", Preempted, 75),
        ("11 CANCELLED 143:0 None", Preempted, 75),
        ("11 FAILED 143:0 NonZeroExitCode", Preempted, 75),
        ("11 CANCELLED 1:0 None", StageError, 5),
        ("11 TIMEOUT 0:0 TimeLimit", StageError, 5),
        ("11 OUT_OF_MEMORY 0:125 OutOfMemory", StageError, 5),
        ("11 COMPLETED 0:0 None", ConfigError, 2),
    ],
)
def test_a_job_that_did_not_end_well_ends_the_run_as_its_driver_did(
    sft: Plan, fakes: Fakes, answer: str, error: type[AlignmentError], code: int
) -> None:
    log = sft.run_folder / "sft/slurm-11.log"
    log.parent.mkdir()
    log.write_text("stage sft: the loss is NaN at step 3\n")
    fakes.answers([answer])
    with pytest.raises(error) as caught:
        follow(sft)
    assert caught.value.exit_code == code
    assert caught.value.where == "stage sft"
    assert f"log: {log}" in str(caught.value)
    assert ("run the same command to continue; log" in str(caught.value)) == (code == 75)
    assert "the loss is NaN" in str(caught.value) or code == 2


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        ("BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT", True),
        ("PENDING CONFIGURING RUNNING SUSPENDED STOPPED REQUEUED RESIZING SIGNALING STAGE_OUT COMPLETING", False),
    ],
)
def test_states_of_a_job_mean_what_slurm_documents(states: str, ended: bool) -> None:
    """The states of https://slurm.schedmd.com/job_state_codes.html."""
    assert {state: slurm.Job(state=state).ended for state in states.split()} == dict.fromkeys(states.split(), ended)


def test_a_job_that_the_queue_has_forgotten_is_looked_up_in_the_accounts(fakes: Fakes) -> None:
    fakes.command("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    fakes.command("sacct", 'echo "11|CANCELLED by 1000|0:0"; echo "12|FAILED|9:0"')
    assert slurm.look(["11", "12", "13"]) == {
        "11": slurm.Job(state="CANCELLED"),
        "12": slurm.Job(state="FAILED", exit_code=9),
    }


def test_a_controller_that_gives_no_answer_is_none(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.command("squeue", 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1')
    assert slurm.look(["11"]) is None
    fakes.command("squeue", "exec sleep 60")
    monkeypatch.setattr(slurm, "_ASK_SECONDS", 0.05)
    assert slurm.look(["11"]) is None


def status(run_folder: Path) -> str:
    """What ``align status quickstart`` prints."""
    screen = StringIO()
    show_status(Console(file=screen, width=160), run_folder.parent.parent, "quickstart")
    return screen.getvalue()


def test_status_shows_the_job_of_each_stage_to_come(submit: Submit, fakes: Fakes, run_folder: Path) -> None:
    submit()
    fakes.answers(["11 RUNNING 0:0 None", "12 PENDING 0:0 Dependency"])
    shown = status(run_folder)
    assert re.search(r"^sft +waiting .*job 11 RUNNING *$", shown, re.MULTILINE)
    assert re.search(r"^reward +waiting .*job 12 PENDING \(Dependency\) *$", shown, re.MULTILINE)
    assert re.search(r"^ppo +waiting .*job 14 *$", shown, re.MULTILINE)


def test_status_needs_no_slurm(
    submit: Submit, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.search(r"^sft +waiting .*job 11 *$", status(run_folder), re.MULTILINE)


def test_a_run_whose_lock_is_not_seen_here_but_whose_job_is_left_was_not_killed(
    submit: Submit, fakes: Fakes, run_folder: Path
) -> None:
    submit()
    (run_folder / "run.json").write_text(json.dumps({**record(run_folder), "state": "running"}))
    fakes.answers(["11 RUNNING 0:0 None"])
    assert status(run_folder).split()[:2] == ["quickstart", "running"]
    fakes.answers(["11 FAILED 1:0 NonZeroExitCode"])
    assert status(run_folder).split()[:2] == ["quickstart", "killed"]


def test_a_run_is_not_called_killed_while_slurm_does_not_answer(
    submit: Submit, run_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    submit()
    (run_folder / "run.json").write_text(json.dumps({**record(run_folder), "state": "running"}))
    monkeypatch.setenv("PATH", str(tmp_path))
    printed = status(run_folder)
    assert printed.split()[:2] == ["quickstart", "unknown"]
    assert "quickstart may still be running, which cannot be seen from here (Slurm does not answer); " in printed
