"""Two machines, played by two launchers on the loopback address: the same result as two processes of one machine."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import environment

RECIPE = "defaults: [base, stage@stages.sft: sft, _self_]\nsummary: one stage\n"
SMALL = (
    "data={source: 'bundled:quickstart/conversations', limit: 12}",
    "max_length=4096",
    "optim={batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}",
)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_two_machines_make_what_two_processes_make(tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE)

    def start(output: str, *launch: str) -> subprocess.Popen[str]:
        told = [f"output={tmp_path / output}", f"model.source=path:{tiny_model_folder}", "model.dtype=float32"]
        told += ["launch.threads=1", *launch, "stages.sft.init=base", *(f"stages.sft.{setting}" for setting in SMALL)]
        argv = [sys.executable, "-m", "alignment.cli", "run", str(recipe), *told]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())

    together = start("one", "launch.num_processes=2")
    assert ended(together)[0] == 0
    (status,) = (tmp_path / "one").glob("runs/*/sft/status.json")
    assert json.loads(status.read_text())["where"].endswith(" of 2")
    meeting = ("launch/backend=machines", f"launch.backend.main_port={free_port()}")
    machines = [start("two", *meeting, f"launch.backend.machine_rank={rank}") for rank in (1, 0)]
    codes, printed = zip(*map(ended, machines), strict=True)
    assert codes == (0, 0), printed
    assert "machine 1 of 2 waits for the first to start it" in printed[0]
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was printed."""
    with process:
        printed = process.communicate(timeout=300)[0]
    return process.returncode, printed


def weights(output: Path) -> list[str]:
    found = [path.read_bytes() for path in sorted(output.glob("artifacts/*/**/*.safetensors"))]
    assert found
    return [hashlib.sha256(content).hexdigest() for content in found]
