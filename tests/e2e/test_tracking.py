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

from alignment.artifacts import verify
from alignment.resources import shipped
from alignment.training.trackers.wandb import stable_id
from alignment.training.trackers.wandb_log import records
from tests.e2e.conftest import Align

CANARY = "c4nary5ecret"
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY}",
    "WANDB_API_KEY": f"{CANARY}{CANARY}{CANARY}wandb",  # of the length that W&B asks for
    "AWS_SECRET_ACCESS_KEY": f"aws{CANARY}",
    "OPENAI_API_KEY": f"sk-{CANARY}",
    "GIT_ASKPASS_TOKEN": CANARY,
}
FEW = (
    *(f"~stages.{stage}" for stage in ("sft", "reward", "ppo", "report")),
    "stages.dpo.init=base",
    "stages.evaluate={arms: [base, 'stage:dpo'], reference: base, reward: null}",
)


def _agent_s_command(params: dict[str, Any]) -> list[str]:
    """What W&B's agent makes of our sweep file for one trial (wandb/wandb_agent.py)."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    told = yaml.safe_load((shipped("launch") / "wandb" / "dpo_beta.yaml").read_text(encoding="utf-8"))
    filled = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in params.items()}})
    command: list[str] = []
    for part in utils.create_sweep_command(told["command"]):
        is_variable = part.startswith("${") and part.endswith("}")
        command += filled[part[2:-1]] if is_variable else [part]
    return command


def _repository(folder: Path) -> Path:
    """A git repository whose remote has a password in it, to be called from."""
    for argv in (["init", "-q"], ["remote", "add", "origin", f"https://me:{CANARY}@example.org/mine.git"]):
        subprocess.run(["git", *argv], cwd=folder, check=True)
    return folder


def test_an_agent_s_trial_is_tracked_whole_and_tells_no_secret(new_align: Callable[[], Align], tmp_path: Path) -> None:
    align = new_align()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "align"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m alignment.cli "$@"\n')
    program.chmod(0o755)
    root = Path(__file__).parents[2]
    variables = align.environment | SECRETS
    variables |= {"WANDB_SWEEP_ID": "5weep", "WANDB_RUN_ID": "tr1al", "WANDB_PROJECT": "alignment"}
    variables |= {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    variables["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    overrides = align.argv("run", "tracking=[jsonl,wandb,tensorboard]", *FEW)
    small = [one for one in overrides[overrides.index("quickstart") + 1 :] if not one.startswith(_GONE)]
    done = subprocess.run(
        [*_agent_s_command({"stages.dpo.beta": 0.3}), *small],
        cwd=_repository(tmp_path),
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + align.logs()

    runs = {name: _records(align.output / "runs/quickstart.tr1al" / name) for name in ("dpo", "evaluate")}
    dpo = verify(next(align.output.glob("artifacts/dpo-*")), content=False)
    assert dpo.identity["config"]["beta"] == 0.3
    told = {name: next(one.run for one in found if one.HasField("run")) for name, found in runs.items()}
    assert told["dpo"].run_id == stable_id("quickstart.tr1al", "dpo", dpo.fingerprint)
    assert (told["evaluate"].run_id, told["evaluate"].sweep_id) == ("tr1al", "5weep")
    assert {run.run_group for run in told.values()} == {"5weep"}
    summary = [line for one in runs["evaluate"] for line in one.summary.update if line.key == "gold/dpo"]
    assert [json.loads(line.value_json) for line in summary] == [_gold_of_dpo(align.output)]
    made, used = ({one.artifact.name for one in found if one.artifact.type == "policy"} for found in runs.values())
    assert made == used == {f"dpo-{dpo.fingerprint[:8]}"}
    assert len(list(align.output.glob("runs/*/*/tensorboard/events.*"))) == 2

    files = [path for folder in (align.output, tmp_path) for path in folder.rglob("*") if path.is_file()]
    git = tmp_path / ".git"
    assert [path for path in files if not path.is_relative_to(git) and CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + done.stderr
    assert not list(tmp_path.glob("wandb"))


_GONE = tuple(f"stages.{stage}." for stage in ("sft", "reward", "ppo", "report"))


def _records(folder: Path) -> list[Any]:
    (file,) = folder.rglob("*.wandb")
    return list(records(file))


def _gold_of_dpo(output: Path) -> float:
    (file,) = output.glob("artifacts/evaluate-*/evaluation.json")
    return next(arm["gold"]["mean"] for arm in json.loads(file.read_text())["arms"] if arm["name"] == "stage:dpo")
