"""Two machines, played by two launchers on the loopback address: the same result as two processes of one machine."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import environment

RECIPE = """
defaults: [base, stage@stages.sft: sft, stage@stages.forgetting: forgetting, _self_]
summary: a stage that trains and one that measures
stages:
  forgetting:
    {arms: ["stage:sft"], data: {limit: 6}, max_perplexity_rise: null, max_ability_drop: null, bootstrap_samples: 20}
"""
SMALL = (
    "data={source: 'bundled:quickstart/conversations', limit: 12}",
    "max_length=4096",
    "optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}",
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_two_machines_make_what_two_processes_make(tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE)

    def start(output: str, *launch: str) -> subprocess.Popen[str]:
        overrides = [f"output={tmp_path / output}", f"model.source=path:{tiny_model_folder}", "model.dtype=float32"]
        overrides += [
            "launch.threads=1",
            *launch,
            "stages.sft.init=base",
            *(f"stages.sft.{setting}" for setting in SMALL),
        ]
        argv = [sys.executable, "-m", "alignment.cli", "run", str(recipe), *overrides]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())

    together = start("one", "launch.num_processes=2")
    assert ended(together)[0] == 0
    statuses = sorted((tmp_path / "one").glob("runs/*/*/status.json"))
    assert [json.loads(status.read_text())["where"].rpartition(" ")[2] for status in statuses] == ["2", "2"]
    meeting = ("launch/backend=machines", f"launch.backend.main_port={free_port()}")
    machines = [start("two", *meeting, f"launch.backend.machine_rank={rank}") for rank in (1, 0)]
    codes, printed = zip(*map(ended, machines), strict=True)
    assert codes == (0, 0), printed
    assert "machine 1 of 2 is waiting for the first machine to start it" in printed[0]
    assert "forgetting: machine 1 of 2 is waiting for the first machine to start it" in printed[0]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert measured(tmp_path / "one") == measured(tmp_path / "two")
    assert (next((tmp_path / "two").glob("runs/*/forgetting/")) / "log-1.txt").exists()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed."""
    with process:
        printed = process.communicate(timeout=300)[0]
    return process.returncode, printed


def measured(output: Path) -> list[bytes]:
    """What the policy was measured on, and its figures."""
    (artifact,) = output.glob("artifacts/forgetting-*")
    return [(artifact / name).read_bytes() for name in ("forgetting.json", "texts.jsonl", "questions.jsonl")]


def weights(output: Path) -> list[str]:
    contents = [path.read_bytes() for path in sorted(output.glob("artifacts/*/**/*.safetensors"))]
    assert contents
    return [hashlib.sha256(content).hexdigest() for content in contents]
