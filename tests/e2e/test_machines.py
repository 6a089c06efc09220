"""Several processes of one command: two machines, a lost or stuck process, a sweep with two trials at once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignment.core.locks import is_held
from tests.e2e.conftest import SMALL, Align, environment
from tests.living import descendants_of, wait_until, words_of

RECIPE = """
defaults: [base, stage@stages.sft: sft, stage@stages.forgetting: forgetting, _self_]
summary: a stage that trains and one that measures
stages:
  sft:
    init: base
    data: {source: "bundled:quickstart/conversations", limit: 12}
    max_length: 4096
    optim: {batch_size: 4, micro_batch_tokens: 60, lr: 1e-3}
  forgetting:
    {arms: ["stage:sft"], data: {limit: 6}, max_perplexity_rise: null, max_ability_drop: null, bootstrap_samples: 20}
"""


def test_two_machines_make_what_two_processes_make(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Machines are played by two launchers on the loopback address."""
    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE)

    def start(output: str, *launch: str) -> subprocess.Popen[str]:
        model = (f"model.source=path:{tiny_model_folder}", "model.dtype=float32", "launch.threads=1")
        argv = [sys.executable, "-m", "alignment.cli", "run", str(recipe), f"output={tmp_path / output}"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*argv, *model, *launch], env=environment(), **pipes)

    def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
        with process:
            printed = process.communicate(timeout=300)[0]
        return process.returncode, printed

    def made(output: str) -> dict[str, bytes]:
        (measured,) = (tmp_path / output).glob("artifacts/forgetting-*")
        files = [measured / name for name in ("forgetting.json", "texts.jsonl", "questions.jsonl")]
        files += (tmp_path / output).glob("artifacts/*/**/*.safetensors")
        return {file.name: file.read_bytes() for file in files}

    assert ended(start("one", "launch.num_processes=2"))[0] == 0
    statuses = sorted((tmp_path / "one").glob("runs/*/*/status.json"))
    assert [json.loads(status.read_text())["where"].rpartition(" ")[2] for status in statuses] == ["2", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("launch/backend=machines", f"launch.backend.main_port={port}")
    machines = [start("two", *meeting, f"launch.backend.machine_rank={rank}") for rank in (1, 0)]
    codes, printed = zip(*map(ended, machines), strict=True)
    assert codes == (0, 0), printed
    assert printed[0].count("machine 1 of 2 is waiting for the first machine") == 2, "for each stage"
    assert made("one") == made("two")
    assert any(name.endswith(".safetensors") for name in made("one"))
    assert (next((tmp_path / "two").glob("runs/*/forgetting/")) / "log-1.txt").exists()


TWO = (
    "~stages.dpo",
    "~stages.evaluate",
    "~stages.report",
    "launch.num_processes=2",
    "stages.sft.optim={batch_size: 4, micro_batch_tokens: 60, epochs: 500, lr: 1e-3}",
)
"""Training that would go on for minutes."""


def _worker(driver: subprocess.Popen[str], align: Align, rank: int) -> psutil.Process:
    """The process of that rank, once the first steps are logged."""
    workers: list[psutil.Process] = []

    def is_worker(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return "alignment.worker" in process.cmdline() and process.environ().get("RANK") == str(rank)
        return False

    def is_there() -> bool:
        assert driver.poll() is None, f"it ended by itself\n{align.logs()}"
        logged = [path.read_text() for path in align.output.glob("artifacts/sft-*.work/content/metrics.jsonl")]
        workers[:] = filter(is_worker, descendants_of(driver.pid))
        return bool(logged and logged[0] and workers)

    wait_until(is_there, seconds=120, error=align.logs)
    return workers[0]


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, "process 1 ended by signal 9"), (signal.SIGSTOP, "process 1 of 2 has not run for 12 seconds: ")],
)
def test_a_lost_process_ends_the_run_and_is_named(
    new_align: Callable[[], Align], number: signal.Signals, expected: str
) -> None:
    align = replace(new_align(), recipe="sft_dpo")
    argv = align.argv("run", *TWO, "launch.hang_seconds=12")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(argv, env=environment(), **pipes) as driver:
        try:
            os.kill(_worker(driver, align, rank=1).pid, number)
            printed, _ = driver.communicate(timeout=60)
        finally:
            driver.kill()
    assert driver.returncode == 5, printed
    assert expected in printed, printed
    assert "→" in printed, "and a remedy"
    wait_until(lambda: not any(str(align.output) in " ".join(words_of(process)) for process in psutil.process_iter()))


def test_only_what_a_setting_reaches_is_made_for_each_value(new_forked: Callable[[], Align], tmp_path: Path) -> None:
    align = new_forked()
    file = tmp_path / "betas.yaml"
    file.write_text("objective: {arm: 'stage:dpo'}\nparameters: [{key: stages.dpo.beta, values: [0.1, 0.3]}]\n")
    assert align.forked is not None
    argv = align.argv("sweep")
    verb = argv.index("sweep")
    code, printed = align.forked.run([*argv[verb : verb + 2], str(file), *argv[verb + 2 :]])
    assert code == 0, printed
    assert re.search("^(best|tied): stages.dpo.beta=", printed, re.MULTILINE)
    made = Counter(json.loads(path.read_text())["stage"] for path in align.output.glob("artifacts/*/manifest.json"))
    assert made == {"sft": 1, "evaluate_sft": 1, "reward": 1, "ppo": 1, "dpo": 2, "evaluate": 2, "report": 2}
    folder = align.output / "sweeps/quickstart.betas"
    record = json.loads((folder / "sweep.json").read_text())
    rows = record["trials"]
    assert {tuple(row["words"]) for row in rows} == {("stages.dpo.beta=0.1",), ("stages.dpo.beta=0.3",)}
    for row in rows:
        assert row["figures"][0]["low"] <= row["figures"][0]["mean"] <= row["figures"][0]["high"]
        assert (folder / row["report"]).is_file()
        assert row["report"] in (folder / "sweep.html").read_text()
    assert list(record["goals"][0]["shared_arms"]) == ["base", "base+prompt", "sft", "ppo"]


FILES = {
    "two.yaml": """\
defaults: [base, stage@stages.sft: sft, stage@stages.dpo: dpo, _self_]
summary: two stages
stages:
  sft: {data: {source: "bundled:quickstart/conversations"}}
  dpo: {data: {source: "bundled:quickstart/preferences"}}
""",
    "betas.yaml": """\
objective: {stage: dpo, metric: rewards/accuracies}
parameters: [{key: stages.dpo.beta, values: [0.1, 0.3]}]
""",
}


def test_two_at_once_share_a_stage_survive_a_kill_of_the_sweep_and_go_on(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    small = [setting for setting in SMALL if setting.startswith(("launch.", "model.", "stages.sft", "stages.dpo"))]
    overrides = [f"output={tmp_path}", f"model.source=path:{tiny_model_folder}", *small]
    argv = [sys.executable, "-m", "alignment.cli", "sweep", "./two.yaml", "./betas.yaml", "--at-once", "2", *overrides]

    killed = subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: any(tmp_path.glob("artifacts/sft-*.work/progress.json")))
    killed.kill()
    killed.wait()
    runs = [tmp_path / f"runs/two.betas.{number}" for number in (0, 1)]
    wait_until(
        lambda: not any(is_held(lock) for lock in [*tmp_path.glob("artifacts/*/lock"), *(r / "lock" for r in runs)])
    )

    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search("^(best|tied): stages.dpo.beta=", done.stdout, re.MULTILINE)
    made = [json.loads(path.read_text())["stage"] for path in tmp_path.glob("artifacts/*/manifest.json")]
    assert sorted(made) == ["dpo", "dpo", "sft"]
    for run in runs:
        record = json.loads((run / "run.json").read_text())
        assert record["state"] == "done"
        assert {stage["state"] for stage in record["stages"].values()} <= {"done", "reused"}
    assert list(tmp_path.glob("artifacts/*.work")) == []
