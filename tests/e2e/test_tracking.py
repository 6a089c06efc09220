"""A trial as an agent of a W&B sweep starts it, every tracker on: what lies on the disk, and what must not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.core.artifacts import verify
from alignment.core.files import shipped
from alignment.stages.registry import read_spec
from alignment.training.trackers.tracker import stable_id
from alignment.training.trackers.wandb import records
from tests.e2e.conftest import Align

CANARY = "c4nary5ecret"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "WANDB_API_KEY": f"{CANARY}{CANARY}{CANARY}wandb",  # of the length that W&B asks for
    "AWS_SECRET_ACCESS_KEY": f"aws{CANARY}",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "GIT_ASKPASS_TOKEN": CANARY,
    "MLFLOW_TRACKING_PASSWORD": CANARY,
    "TRACKIO_WRITE_TOKEN": CANARY,
}
AGENT = {"WANDB_SWEEP_ID": "5weep", "WANDB_RUN_ID": "tr1al", "WANDB_PROJECT": "alignment"}
OTHERS = ("sft", "evaluate_sft", "reward", "ppo", "report")
OF_THE_OTHERS = tuple(f"stages.{stage}." for stage in OTHERS)
FEW = (
    *(f"~stages.{stage}" for stage in OTHERS),
    "stages.dpo.init=base",
    "stages.evaluate={arms: [base, 'stage:dpo'], reference: base, reward: null}",
)


def _agent_s_command(params: dict[str, Any]) -> list[str]:
    """What W&B's agent makes of our sweep file for one trial (wandb/wandb_agent.py)."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep_file = yaml.safe_load((shipped("launch") / "wandb" / "dpo_beta.yaml").read_text(encoding="utf-8"))
    filled = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in params.items()}})
    command: list[str] = []
    for part in utils.create_sweep_command(sweep_file["command"]):
        is_variable = part.startswith("${") and part.endswith("}")
        command += filled[part[2:-1]] if is_variable else [part]
    return command


def _repository(folder: Path) -> Path:
    """A git repository whose remote has a password in it, to be called from."""
    folder.mkdir()
    for argv in (["init", "-q"], ["remote", "add", "origin", f"https://me:{CANARY}@example.org/mine.git"]):
        subprocess.run(["git", *argv], cwd=folder, check=True)
    return folder


def _program(folder: Path) -> Path:
    folder.mkdir()
    program = folder / "align"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m alignment.cli "$@"\n')
    program.chmod(0o755)
    return program


def _trial(align: Align, folder: Path) -> str:
    """Runs a trial as an agent would, secrets and all; returns what it printed."""
    variables = align.environment | SECRETS | AGENT | {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    variables["PATH"] = f"{_program(folder / 'bin').parent}{os.pathsep}{os.environ['PATH']}"
    variables["PYTHONPATH"] = str(Path(__file__).parents[2])
    argv = align.argv("run", "tracking=[jsonl,wandb,tensorboard]", *FEW)
    overrides = [
        argument for argument in argv[argv.index("quickstart") + 1 :] if not argument.startswith(OF_THE_OTHERS)
    ]
    done = subprocess.run(
        [*_agent_s_command({"stages.dpo.beta": 0.3}), *overrides],
        cwd=_repository(folder / "mine"),
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + align.logs()
    return done.stdout + done.stderr


def test_an_agent_s_trial_is_tracked_whole_and_tells_no_secret(new_align: Callable[[], Align], tmp_path: Path) -> None:
    align = new_align()
    printed = _trial(align, tmp_path)
    run_folder = align.output / "runs/quickstart.tr1al"
    dpo = verify(next(align.output.glob("artifacts/dpo-*")), content=False)
    assert dpo.identity["config"]["beta"] == 0.3

    by_stage = {name: _records(run_folder / name) for name in ("dpo", "evaluate")}
    runs = {
        name: next(record.run for record in of_stage if record.HasField("run")) for name, of_stage in by_stage.items()
    }
    assert runs["dpo"].run_id == stable_id(read_spec(run_folder / "dpo/stage.yaml"))
    assert (runs["evaluate"].run_id, runs["evaluate"].sweep_id) == ("tr1al", "5weep")
    assert {run.run_group for run in runs.values()} == {"5weep"}
    summary = [
        line for record in by_stage["evaluate"] for line in record.summary.update if line.key == "style_and_facts/dpo"
    ]
    assert [json.loads(line.value_json) for line in summary] == [_primary_of_dpo(align.output)]
    made, used = (
        {record.artifact.name for record in of_stage if record.artifact.type == "policy"}
        for of_stage in by_stage.values()
    )
    assert made == used == {f"dpo-{dpo.fingerprint[:8]}"}
    for name in ("dpo", "evaluate"):
        assert list((run_folder / name / "tensorboard").glob("events.*"))
    assert list((run_folder / "evaluate").rglob("arms_*.table.json"))

    files = [path for path in align.output.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "mine"], "nothing outside the run's folder"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".git"]


def _records(folder: Path) -> list[Any]:
    (file,) = folder.rglob("*.wandb")
    return list(records(file))


def _primary_of_dpo(output: Path) -> float:
    (file,) = output.glob("artifacts/evaluate-*/evaluation.json")
    return next(
        arm["metrics"]["style_and_facts"]["mean"]
        for arm in json.loads(file.read_text())["arms"]
        if arm["name"] == "stage:dpo"
    )
